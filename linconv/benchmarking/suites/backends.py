"""linconv's own implementations of an operator."""

import functools

from linconv import ops
from linconv.benchmarking.suite import Absent

__all__ = ["by_backend"]

ON_CUDA = ("cuda", "triton")


def by_backend(function, device):
    """Names and functions of linconv: one on CPU; on CUDA devices one per available backend.

    Args:
        function: takes ``backend``.
    """
    if device != "cuda":
        return [("linconv", function)]
    return [(f"linconv ({backend})", functools.partial(_on, backend, function)) for backend in ON_CUDA]


def _on(backend, function, *arguments, **options):
    state = ops.backends()[backend]
    if state != "available":
        raise Absent(state)
    return function(*arguments, backend=backend, **options)
