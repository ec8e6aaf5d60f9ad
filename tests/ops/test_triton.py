"""Triton kernels in the interpreter and, where there is a GPU, on it; see interpreter.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILES = sorted(Path(__file__).parent.glob("triton_*.py"))
ON_A_GPU = [file for file in FILES if file.stem not in ("triton_fast_interpreter", "triton_sanitizer")]


def run(files, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", *files],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for file in files:  # something of each file passed
        assert re.search(rf"{file.name} [^\n]*\.", done.stdout), done.stdout


@pytest.mark.parametrize("files", [FILES[::2], FILES[1::2]], ids=["first", "second"])  # two: to start takes seconds
def test_in_the_interpreter(files):
    pytest.importorskip("triton")
    run(files, TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("file", ON_A_GPU, ids=lambda file: file.stem)
def test_on_a_gpu(file):
    pytest.importorskip("triton")
    run([file], TRITON_INTERPRET="0")
