"""Triton kernels in the interpreter and, where there is a GPU, on it; see interpreter.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
FILES = sorted(path.name for path in HERE.glob("triton_*.py"))


@pytest.mark.parametrize(
    "where",
    ["interpreter", pytest.param("gpu", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
)
@pytest.mark.parametrize("file", FILES)
def test_kernels(file, where):
    pytest.importorskip("triton")
    if (file, where) == ("triton_sanitizer.py", "gpu"):
        pytest.skip("a GPU has compute-sanitizer")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if where == "interpreter":
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / file)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout
