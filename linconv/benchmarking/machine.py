"""The speed of this machine, and the provenance of results."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import linconv
from linconv.benchmarking.latency import cuda_events, measure, wall_clock
from linconv.ops import dispatch

__all__ = ["matmul_work", "memory_bytes", "provenance", "rates"]

_SIZE = 2048


def matmul_work(size: int = _SIZE, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """A product of two size × size matrices, as a callable, and its floating-point operations."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    # Laid out as a layer's: on a CPU without bfloat16 instructions torch takes 20 times as long or more for a @ b.
    return functools.partial(torch.mm, a, b.mT), 2 * size**3


def rates(device: str = "cpu", dtypes: tuple[str, ...] = ("float32",)) -> dict:
    """The rates for floors, measured now: ``matmul``, operations a second by dtype, and ``copy``, bytes a second."""
    clock, size, mebibytes = (cuda_events, 8192, 2048) if device == "cuda" else (wall_clock, _SIZE, 256)
    matmul = {}
    for dtype in dtypes:
        work, operations = matmul_work(size, getattr(torch, dtype), device)
        matmul[dtype] = operations / measure(work, warmup=3, min_seconds=1, clock=clock).median
    source = torch.ones(mebibytes << 18, device=device)
    target = torch.empty_like(source)
    copied = measure(functools.partial(target.copy_, source), min_repeats=5, clock=clock)
    return {"matmul": matmul, "copy": 2 * source.nbytes / copied.median}


def memory_bytes(device: str = "cpu") -> int:
    """The memory that is free now."""
    if device == "cuda":  # memory that torch reserves but does not use is free
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def provenance() -> dict:
    """Everything needed to decide whether two results are comparable."""
    # Results written next to the code do not change the code.
    commit = _git("rev-parse", "HEAD")
    dirty = _git("status", "--porcelain", ":(top)", ":(top,exclude)benchmarks/results")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "linconv": linconv.__version__,
        "commit": commit,
        "dirty": None if dirty is None else bool(dirty),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("transformers", "triton")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "isa": dispatch.build_info().get("isa"),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "compiler": dispatch.build_info().get("compiler"),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, which virtual machines cut short, and the numbers that tell its generation."""
    try:
        first = cpuinfo.read_text().split("\n\n", 1)[0]
    except OSError:
        return platform.processor()
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    name = told.get("model name") or platform.processor()
    numbers = [f"{key.removeprefix('cpu ')} {told[key]}" for key in ("cpu family", "model") if key in told]
    return f"{name} ({', '.join(numbers)})" if numbers else name
