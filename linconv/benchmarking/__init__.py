"""The measuring harness shared by the demo and the benchmarks."""

from .latency import Latency, compare, measure
from .memory import peak_extra_bytes, peak_resident_bytes
from .scaling import crossover, fit_quadratic, predict

__all__ = [
    "Latency",
    "compare",
    "crossover",
    "fit_quadratic",
    "measure",
    "peak_extra_bytes",
    "peak_resident_bytes",
    "predict",
]
