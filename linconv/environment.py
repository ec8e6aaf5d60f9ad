"""What `linconv env` prints: versions, the machine, and backends with the reasons why others are not available."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from linconv._version import __version__
from linconv.ops import dispatch


def report() -> str:
    """Returns the environment as text: lines of ``name: value``, with blank lines between sections."""
    info = dispatch.build_info()
    isa = info.get("isa") or info.get("isa_error") or "none: no compiled library is loaded"
    if "LINCONV_CPU_ISA" in os.environ and info.get("isa"):
        isa += " (by LINCONV_CPU_ISA)"
    has = ", ".join(f"{name} ({'yes' if there else 'not on this CPU'})" for name, there in info.get("isas", {}).items())
    built = f"linconv {info['version']}, torch {info['torch']} headers, {info['compiler']}" if info else "not loaded"
    sections = [
        {
            "linconv": __version__,
            "location": Path(__file__).parent,
            "python": f"{platform.python_version()} ({platform.python_implementation()})",
            "torch": torch.__version__,
            **{name: _version(name) for name in ("transformers", "triton", "mamba_ssm")},
        },
        {
            "platform": platform.platform(),
            "CPU": cpu_name(),
            "threads": f"{torch.get_num_threads()} of {os.cpu_count()} CPUs",
            "CUDA devices": _cuda_devices(),
        },
        {"CPU library": built, "instruction sets": has or "none", "instruction set in use": isa},
        {f"backend {name}": state for name, state in dispatch.backends().items()},
    ]
    width = max(len(name) for section in sections for name in section) + 1
    lines = ["\n".join(f"{name + ':':<{width}} {value}" for name, value in section.items()) for section in sections]
    return "\n\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _cuda_devices() -> str:
    if torch.version.cuda is None:
        return "none: this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "none found"
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(f"{properties.name} (sm_{properties.major}{properties.minor})")
    return ", ".join(names)
