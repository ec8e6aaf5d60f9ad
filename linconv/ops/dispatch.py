"""The one place that loads the compiled libraries and picks an operator's backend.

The libraries are loaded when this module is imported. One that is missing, cannot be loaded, or was built for another
version of linconv never stops the import: :func:`backends` tells why it is not used, and the first call that would
have used it warns once (:class:`LinconvPerformanceWarning`) and runs on the reference backend.
"""

import importlib.util
import json
import os
import warnings
from pathlib import Path

import torch

from linconv._version import __version__

__all__ = ["LinconvPerformanceWarning", "backends", "build_info", "compiled", "pick", "warn_once"]

NAMES = ("cpu", "triton", "cuda", "mamba_ssm", "reference")
# Where the compiled libraries are; the variable is for a build kept apart, such as one with sanitizers.
LIBRARIES = Path(os.environ.get("LINCONV_LIBRARY_PATH") or Path(__file__).parent.parent / "lib")
REBUILD = "reinstall linconv (from a source tree: `pip install --no-build-isolation -e .`) and look at `linconv env`"


class LinconvPerformanceWarning(UserWarning):
    """A call runs on a much slower backend than this machine could use."""


def _load(name: str) -> str | None:
    """Load one compiled library; returns why it cannot be used, or None."""
    path = LIBRARIES / name
    if not path.exists():
        return f"{name} is not in {LIBRARIES}"
    try:
        torch.ops.load_library(path)
    except OSError as error:  # a missing symbol or library: built for another torch or platform
        return f"{name} cannot be loaded: {error}"
    return None


def _kernels(key: str) -> frozenset[str]:
    """Names of the operators that have a kernel under a dispatch key."""
    prefix = "linconv::"
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return frozenset(name.removeprefix(prefix) for name in names if name.startswith(prefix))


def _load_cpu() -> tuple[str | None, dict]:
    problem = _load("liblinconv_cpu.so")
    if problem is not None:
        return problem, {}
    info = json.loads(torch.ops.linconv._build_info())
    if info["version"] != __version__:
        return f"the compiled library is of linconv {info['version']}, the Python code of {__version__}", info
    return None, info


def _load_cuda() -> str | None:
    name = "liblinconv_cuda.so"
    if not (LIBRARIES / name).exists():
        return _build_info.get("cuda") or f"{name} is not in {LIBRARIES}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if _cpu_problem is not None:  # the CPU library holds the schemas
        return _cpu_problem
    return _load(name)


_cpu_problem, _build_info = _load_cpu()
_isa_problem = _build_info.get("isa_error")
_cpu_kernels = _kernels("CPU") if _cpu_problem is None else frozenset()
_cuda_problem = _load_cuda()
_cuda_kernels = _kernels("CUDA") if _cuda_problem is None else frozenset()
_warned: set[str] = set()


def build_info() -> dict:
    """What the compiled CPU library says of itself: version, torch and compiler it was built with, instruction sets.

    Empty where no library could be loaded.
    """
    return dict(_build_info)


def compiled(op: str) -> bool:
    """Whether ``torch.ops.linconv.<op>`` exists, in a library of this version: fake and autograd may be registered."""
    return _cpu_problem is None and (op in _cpu_kernels or op in _cuda_kernels)


def backends() -> dict[str, str]:
    """Every backend by name: ``"available"``, or the reason why it is not."""
    found = {
        "cpu": _cpu_problem or _isa_problem,
        "triton": "this version has no Triton kernels",
        "cuda": _cuda_problem,
        "mamba_ssm": "this version has no mamba_ssm backend"
        if importlib.util.find_spec("mamba_ssm")
        else "mamba_ssm is not installed",
        "reference": None,
    }
    return {name: found[name] or "available" for name in NAMES}


def warn_once(message: str) -> None:
    """Issue a LinconvPerformanceWarning, the first time only for each message in this process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, LinconvPerformanceWarning, stacklevel=4)


def _reason_against(op: str, device: torch.device, backend: str) -> str | None:
    """Why ``backend`` cannot run ``op`` on ``device``, or None."""
    if backend == "reference":
        return None
    if backend == "cpu":
        if device.type not in ("cpu", "meta"):
            return f"it takes CPU tensors, got {device}"
        return _cpu_problem or _isa_problem or (None if op in _cpu_kernels else f"the library has no {op} kernel")
    if backend == "cuda":
        if device.type not in ("cuda", "meta"):
            return f"it takes CUDA tensors, got {device}"
        return _cuda_problem or (None if op in _cuda_kernels else f"the library has no {op} kernel")
    return backends()[backend]


def pick(op: str, device: torch.device, backend: str | None = None) -> str:
    """The backend that runs ``op`` on tensors of ``device``.

    Args:
        op: the operator's name in ``torch.ops.linconv``.
        device: where its tensors are.
        backend: a name out of :func:`backends` to force it, or None for the best there is.

    Returns:
        ``"cpu"``, ``"cuda"`` or ``"reference"``; the last warns once when it stands in for a compiled kernel.

    Raises:
        ValueError: an unknown name, a forced backend that cannot run here (says why), or a ``LINCONV_CPU_ISA`` that
            names no instruction set of this machine.
    """
    if backend is not None:
        if backend not in NAMES:
            raise ValueError(f"backend={backend!r}: wants one of {', '.join(NAMES)}, or None")
        reason = _reason_against(op, device, backend)
        if reason is not None:
            raise ValueError(f"backend={backend!r} cannot run {op}: {reason}")
        return backend
    wanted = "cuda" if device.type == "cuda" else "cpu"
    reason = _reason_against(op, device, wanted)
    if reason is None:
        return wanted
    if wanted == "cpu" and _isa_problem is not None and _isa_problem.startswith("LINCONV_CPU_ISA"):
        raise ValueError(_isa_problem)  # the user's own setting: no silent substitute
    warn_once(f"linconv: {op} runs on the slow reference backend, not on {wanted}: {reason}. To mend it, {REBUILD}.")
    return "reference"
