"""The suites by name. Each is a module with a one-line docstring and ``cases(device)``."""

from __future__ import annotations

import importlib

from linconv.benchmarking.suite import Case
from linconv.errors import unknown

__all__ = ["NAMES", "get", "title"]

NAMES = ("scan", "selective_scan", "conv", "linformer", "loss", "layer", "model", "generation")


def get(name: str, device: str = "cpu") -> list[Case]:
    """The cases of a suite.

    Raises:
        UserError: there is no such suite.
    """
    return list(_module(name).cases(device))


def title(name: str) -> str:
    return _module(name).__doc__.splitlines()[0]


def _module(name: str):
    if name not in NAMES:
        raise unknown("suite", name, NAMES)
    return importlib.import_module(f"linconv.benchmarking.suites.{name}")
