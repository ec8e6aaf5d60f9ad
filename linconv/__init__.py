"""Linear-time sequence mixers for pretrained transformers: operators, mixers, conversion and distillation.

``import linconv`` loads only the operators. Modules that need transformers, triton or matplotlib load on first use.
"""

import importlib

from linconv import ops
from linconv._version import __version__
from linconv.ops import LinconvPerformanceWarning

__all__ = [
    "LinconvPerformanceWarning",
    "__version__",
    "benchmarking",
    "conversion",
    "convert",
    "distillation",
    "inspect",
    "mixers",
    "ops",
]

_MODULES = ("benchmarking", "conversion", "distillation", "mixers")
_NAMES = {"convert": "linconv.conversion", "inspect": "linconv.conversion"}


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"linconv.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'linconv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
