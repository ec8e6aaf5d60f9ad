"""The one place that loads the compiled libraries, registers operators and picks an operator's backend.

Each operator's schema is in csrc/library.cpp. ``linconv::<op>`` runs the compiled kernels of its tensors'
device; ``linconv::<op>_triton`` has the same schema and runs ``linconv/ops/<op>/triton.py``, imported at first call.

The libraries are loaded when this module is imported. If one is missing, cannot be loaded, or was built for another
version of linconv, the import still succeeds: :func:`backends` says why it is not used, and the first call that would
have used it warns once (:class:`LinconvPerformanceWarning`) and runs on the reference backend.
"""

import functools
import importlib.util
import json
import os
import warnings
from pathlib import Path

import torch

from linconv._version import __version__
from linconv.ops.autograd import call, register_autograd

__all__ = [
    "LinconvPerformanceWarning",
    "backends",
    "build_info",
    "compiled",
    "cpu_library",
    "define_triton",
    "operator",
    "pick",
    "register",
    "register_composite",
    "run",
    "run_triton",
    "warn_once",
]

NAMES = ("cpu", "triton", "cuda", "mamba_ssm", "reference")
# Folder of the compiled libraries; the variable selects a separate build, such as one with sanitizers.
LIBRARIES = Path(os.environ.get("LINCONV_LIBRARY_PATH") or Path(__file__).parent.parent / "lib")
CPU_LIBRARY = "liblinconv_cpu.so"
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
    problem = _load(CPU_LIBRARY)
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
_triton_operators: dict[str, str] = {}  # the module of each operator that has Triton kernels
_gpu_preference: dict[str, tuple[str, ...]] = {}
_of_mamba_ssm = ("ssd", "bidirectional_ssd")  # operators for which the package mamba_ssm has kernels
_interpreting = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when kernels are imported, later
_triton_problems: dict[bool, str | None] = {}  # in its interpreter or not
_warned: set[str] = set()


def build_info() -> dict:
    """What the compiled CPU library reports: its version, the torch and compiler of its build, instruction sets.

    Empty if no library could be loaded.
    """
    return dict(_build_info)


def cpu_library() -> Path | None:
    """The compiled CPU library; None if it is not used, for a reason that :func:`backends` gives."""
    return LIBRARIES / CPU_LIBRARY if _cpu_problem is None else None


def compiled(op: str) -> bool:
    """Whether ``torch.ops.linconv.<op>`` has a kernel, in a library of this version."""
    return _cpu_problem is None and (op in _cpu_kernels or op in _cuda_kernels)


def _triton_problem() -> str | None:
    """Why no Triton kernel can run, or None."""
    if not _triton_operators:
        return "this version has no Triton kernels" if _cpu_problem is None else _cpu_problem
    if torch.compiler.is_compiling():  # which would guard on the dictionary, and recompile once it is filled
        return _problem_with("triton")
    if interpreting() not in _triton_problems:  # kept, since every call asks
        _triton_problems[interpreting()] = _problem_with("triton")
    return _triton_problems[interpreting()]


def _mamba_ssm_problem() -> str | None:
    """Why the package mamba_ssm cannot run, or None."""
    return _problem_with("mamba_ssm")


def _problem_with(package: str) -> str | None:
    """Why the Triton kernels of a package cannot run, or None."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if not (torch.cuda.is_available() or interpreting()):
        return "torch sees no CUDA device, and TRITON_INTERPRET=1 is not set"
    return None


@functools.cache
def _gpu_problem(index: int, architectures: str | None) -> str | None:
    """Why a GPU cannot run code for these architectures (as in CMake; None: Triton kernels), or None."""
    major, minor = torch.cuda.get_device_capability(index)
    have = 10 * major + minor
    if architectures is None:
        runs, wanted = have >= 80, "8.0 or later"
    else:
        runs, wanted = any(_runs_on(have, *a.split("-")) for a in architectures.split()), architectures
    if runs:
        return None
    built = "" if architectures is None else ": rebuild linconv with LINCONV_CUDA_ARCHS for this GPU"
    return f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, wanted {wanted}{built}"


def _runs_on(have: int, architecture: str, kind: str) -> bool:
    if not architecture.isdigit():  # such as 90a: only for that GPU
        return architecture.rstrip("af") == str(have)
    number = int(architecture)
    return number <= have and (kind == "virtual" or number // 10 == have // 10)


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors: only for checks of their results."""
    return _interpreting


def register(op, *, fake, setup_context, backward, fake_backward=None, triton=None, prefer=("cuda", "triton")) -> None:
    """Register ``linconv::<op>`` with torch, for every backend that has it.

    Args:
        op: the operator's name; ``<op>_backward`` computes its gradients.
        fake, fake_backward: shape functions of the two operators; the latter None if the gradients consist of operators
            with their own.
        setup_context, backward: the autograd formula. ``backward`` finds ``<op>_backward``, of the backend that ran
            forward, as ``ctx.backward_operator``.
        triton: the module with functions named as the two operators, which run the Triton kernels; imported at the
            first call. None if there are none.
        prefer: backends for CUDA tensors, best first.
    """
    if _cpu_problem is not None:  # the CPU library holds the schemas
        return
    kernels = _cpu_kernels | _cuda_kernels
    backend_of = {op: None} if op in kernels else {}
    if triton is not None:
        for name in (op, f"{op}_backward"):
            define_triton(name, triton)
        backend_of[f"{op}_triton"] = "triton"
    _gpu_preference[op] = prefer
    for name, backend in backend_of.items():
        suffix = "_triton" if backend else ""

        def with_operator(ctx, *grads, backend=backend):
            if fake_backward is not None:
                ctx.backward_operator = operator(f"{op}_backward", backend or grads[0].device.type)
            return backward(ctx, *grads)

        torch.library.register_fake(f"linconv::{name}", fake)
        if fake_backward is not None:
            torch.library.register_fake(f"linconv::{op}_backward{suffix}", fake_backward)
        register_autograd(name, with_operator, setup_context)


def register_composite(op, run, *, fake, setup_context=None, backward=None) -> bool:
    """Register ``linconv::<op>`` with torch, an operator composed of others on every device.

    Args:
        op, fake, setup_context, backward: as for :func:`register`; there is no ``ctx.backward_operator``. Without a
            formula the operator has no gradients.
        run: its implementation.

    Returns:
        Whether it was registered: the CPU library holds the schemas, and an older build may lack this one.
    """
    if _cpu_problem is not None or not hasattr(torch.ops.linconv, op):
        return False
    torch.library.impl(f"linconv::{op}", "CompositeExplicitAutograd", run)
    torch.library.register_fake(f"linconv::{op}", fake)
    if backward is not None:
        register_autograd(op, backward, setup_context)
    return True


def define_triton(name: str, module: str, run=None) -> None:
    """Define ``linconv::<name>_triton`` with the schema of ``linconv::<name>``.

    Args:
        name: the operator's name.
        module: the module of its Triton kernels, or of those that it uses.
        run: its implementation; None for the module's function of that name, imported at the first call.
    """
    schema = str(getattr(torch.ops.linconv, name).default._schema).split("(", 1)[1]
    torch.library.define(f"linconv::{name}_triton", f"({schema}")
    run = run or functools.partial(run_triton, module, name)
    torch.library.impl(f"linconv::{name}_triton", "CompositeExplicitAutograd", run)
    _triton_operators[name] = module


@functools.cache
def _triton_function(module: str, name: str):
    return getattr(importlib.import_module(module), name)


def run_triton(module: str, name: str, *arguments):
    """Run a module's function of Triton kernels, on the device of its first tensor."""
    function = _triton_function(module, name)
    if not all(map(_is_told, arguments)):
        arguments = tuple(a if _is_told(a) else a.contiguous() for a in arguments)
    nested = (a if isinstance(a, list | tuple) else (a,) for a in arguments)
    device = next(x.device for values in nested for x in values if isinstance(x, torch.Tensor))
    # Triton launches on the current device, whatever the tensors' device. Checking it is faster than setting it again.
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return function(*arguments)
    with torch.cuda.device(device):
        return function(*arguments)


def _is_told(x) -> bool:
    """Whether kernels get all of an argument's layout. They take no stride of lengths and bounds."""
    return (
        not isinstance(x, torch.Tensor)
        or x.dim() != 1
        or x.is_floating_point()
        or x.dtype == torch.bool
        or x.is_contiguous()
    )


def operator(op: str, backend: str):
    """The torch operator that runs ``op`` on ``backend`` ("cpu", "cuda" or "triton")."""
    if backend == "triton" or (backend == "cuda" and op not in _cuda_kernels):
        return getattr(torch.ops.linconv, f"{op}_triton")
    return getattr(torch.ops.linconv, op)


def run(op: str, backend: str, *arguments):
    """The result of the torch operator that runs ``op`` on ``backend``."""
    return call(operator(op, backend), *arguments)


def backends() -> dict[str, str]:
    """Every backend by name: ``"available"``, or the reason why it is not."""
    found = {
        "cpu": _cpu_problem or _isa_problem,
        "triton": _triton_problem(),
        "cuda": _cuda_problem,
        "mamba_ssm": _mamba_ssm_problem(),
        "reference": None,
    }
    return {name: found[name] or "available" for name in NAMES}


def warn_once(message: str) -> None:
    """Issue a LinconvPerformanceWarning once per message and process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, LinconvPerformanceWarning, stacklevel=4)


def _problem_of(device: torch.device, architectures: str | None) -> str | None:
    if device.type != "cuda" or torch.compiler.is_compiling():  # compiled code must not query the GPU
        return None
    return _gpu_problem(torch.cuda.current_device() if device.index is None else device.index, architectures)


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
        problem = _cuda_problem or (None if op in _cuda_kernels else f"the library has no {op} kernel")
        return problem or _problem_of(device, _build_info.get("cuda_architectures"))
    if backend == "triton":
        if device.type not in ("cpu" if interpreting() else "cuda", "meta"):
            return f"it takes {'CPU' if interpreting() else 'CUDA'} tensors, got {device}"
        problem = _triton_problem() or (None if op in _triton_operators else f"there is no Triton kernel of {op}")
        return problem or _problem_of(device, None)
    problem = _mamba_ssm_problem() or (None if op in _of_mamba_ssm else f"mamba_ssm has no {op}")
    if problem is None and device.type not in ("cpu" if interpreting() else "cuda", "meta"):
        problem = f"it takes {'CPU' if interpreting() else 'CUDA'} tensors, got {device}"
    return problem


def pick(
    op: str,
    device: torch.device,
    backend: str | None = None,
    *,
    prefer: tuple[str, ...] | None = None,
    cuda_takes: bool = True,
) -> str:
    """The backend that runs ``op`` on tensors of ``device``.

    Args:
        op: the operator's name in ``torch.ops.linconv``.
        device: where its tensors are.
        backend: a name from :func:`backends` to force that backend, or None for the best available.
        prefer: backends for CUDA tensors in this call, best first; None for the operator's registered order.
        cuda_takes: whether the CUDA C++ kernel supports these arguments. If not, Triton's runs when "cuda" is
            requested.

    Returns:
        ``"cpu"``, ``"cuda"``, ``"triton"``, ``"mamba_ssm"`` or ``"reference"``; the last warns once if it
        replaces a kernel.

    Raises:
        ValueError: the name is unknown, a forced backend cannot run here (with the reason), or ``LINCONV_CPU_ISA``
            names no instruction set of this machine.
    """
    if backend is not None:
        if backend not in NAMES:
            raise ValueError(f"backend={backend!r}: wants one of {', '.join(NAMES)}, or None")
        runs = backend if backend != "cuda" or cuda_takes else "triton"
        reason = _reason_against(op, device, backend) or _reason_against(op, device, runs)
        if reason is not None:
            raise ValueError(f"backend={backend!r} cannot run {op}: {reason}")
        return runs
    reasons = []
    on_gpu = prefer or _gpu_preference.get(op, ("cuda", "triton"))
    for wanted in on_gpu if device.type == "cuda" else ("cpu",):
        reason = _reason_against(op, device, wanted)
        if wanted == "cuda" and not cuda_takes:
            reason = "its kernel does not take these arguments"
        if reason is None:
            return wanted
        reasons.append(f"not on {wanted}: {reason}")
    if wanted == "cpu" and _isa_problem is not None and _isa_problem.startswith("LINCONV_CPU_ISA"):
        raise ValueError(_isa_problem)  # the user's own setting: no silent substitute
    mend = f"To fix this, {REBUILD}" if device.type in ("cpu", "cuda") else "There are kernels for CPU and CUDA tensors"
    warn_once(f"linconv: {op} runs on the slow reference backend, {'; '.join(reasons)}. {mend}.")
    return "reference"
