"""What the machine at hand can do, and what a result was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import linconv
from linconv.benchmarking.latency import measure
from linconv.ops import dispatch

__all__ = ["copy_bandwidth", "matmul_rate", "matmul_work", "provenance"]

_SIZE = 2048


def matmul_work(size: int = _SIZE):
    """A product of two size × size float32 matrices, as a callable, and its floating-point operations."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return lambda: a @ b, 2 * size**3


def matmul_rate(size: int = _SIZE) -> float:
    """Floating-point operations a second of a large fp32 ``torch.mm``, the floor of everything made of products."""
    work, flops = matmul_work(size)
    return flops / measure(work, warmup=3, min_repeats=9).median


def copy_bandwidth(mebibytes: int = 512) -> float:
    """Bytes a second of copying a large tensor to another: read and written bytes both count."""
    source = torch.ones(mebibytes << 18)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure(lambda: target.copy_(source), min_repeats=5).median


def provenance() -> dict:
    """Everything needed to tell whether two results may be compared."""
    commit, dirty = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "linconv": linconv.__version__,
        "commit": commit,
        "dirty": None if dirty is None else bool(dirty),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "isa": dispatch.build_info().get("isa"),
        "compiler": dispatch.build_info().get("compiler"),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()
