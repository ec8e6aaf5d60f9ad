"""How an operator's ``triton.py`` makes memory and launches kernels, or lists what it would launch."""

import os
import threading

import torch
import triton.language as tl

from linconv.ops.triton_builds import DEFAULT_OPTIONS, Build, build_of

__all__ = ["ALL_REGISTERS", "MATH", "POISONED", "capability_of", "empty", "launch", "launched", "listener"]

MATH = {torch.float32: tl.float32, torch.float64: tl.float64}

# An option of kernels of up to 8 warps. Told no limit, the compiler may spill a few registers of a thread so that one
# block more fits on a multiprocessor.
ALL_REGISTERS = {"maxnreg": 255}

# Whether results start as NaN, so that tests see what a kernel forgets to write.
POISONED = os.environ.get("LINCONV_POISON") == "1"

_record: list | None = None  # where launches go if they are not to be run
_recorded_capability = 0  # and the GPUs they are for

# Its attribute `current`, which each thread sets for itself, is told of the memory that is made and of the kernels that
# are launched; see triton_replay.py.
listener = threading.local()


def empty(shape, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Memory for a result; NaN where results are poisoned."""
    memory = torch.empty(shape, dtype=dtype, device=like.device)
    if (heard := getattr(listener, "current", None)) is not None:
        heard.on_empty(memory)
    return memory.fill_(float("nan")) if POISONED else memory


def launch(kernel, grid: tuple, arguments: dict, num_warps: int, num_stages: int = 1, **options) -> None:
    """Runs a kernel; a grid without blocks is not launched."""
    if 0 in grid:
        return
    if _record is not None:
        _record.append((kernel, arguments, num_warps, num_stages, options))
        return
    options = {**DEFAULT_OPTIONS, **options}
    compiled = kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages, **options)
    if (heard := getattr(listener, "current", None)) is not None:
        heard.on_launch(kernel, grid, arguments, compiled)


def capability_of(x: torch.Tensor) -> int:
    """The compute capability of the GPU that ``x`` is on, such as 90; that of Hopper in the interpreter."""
    if _record is not None:
        return _recorded_capability
    major, minor = torch.cuda.get_device_capability(x.device) if x.device.type == "cuda" else (9, 0)
    return 10 * major + minor


def launched(run, label: str, capability: int = 90) -> list[Build]:
    """The builds that ``run()``, on tensors of the meta device, would launch on such a GPU; nothing is run."""
    global _record, _recorded_capability
    _record, _recorded_capability = [], capability
    try:
        run()
        return [build_of(*found[:4], label, **found[4]) for found in _record]
    finally:
        _record = None
