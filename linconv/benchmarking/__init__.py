"""The measuring harness shared by the demo and the benchmarks."""

from linconv.benchmarking.curves import Curve, audio_forward, latency_curves, memory_curve
from linconv.benchmarking.latency import Latency, compare, measure
from linconv.benchmarking.memory import keep_freed_memory, peak_extra_bytes, peak_resident_bytes
from linconv.benchmarking.scaling import crossover, fit_quadratic, predict

__all__ = [
    "Curve",
    "Latency",
    "audio_forward",
    "compare",
    "crossover",
    "fit_quadratic",
    "keep_freed_memory",
    "latency_curves",
    "measure",
    "memory_curve",
    "peak_extra_bytes",
    "peak_resident_bytes",
    "predict",
]
