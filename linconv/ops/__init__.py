"""Operators: each is a ``torch.library`` operator, ``torch.ops.linconv.<name>``, with its public function here."""

from linconv.ops.dispatch import LinconvPerformanceWarning, backends

__all__ = ["LinconvPerformanceWarning", "backends"]
