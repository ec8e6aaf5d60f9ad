"""Wall-clock time of a piece of work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Latency:
    """Seconds one call took: the median over ``repeats`` calls, the fastest and slowest of them, and all in order."""

    median: float
    fastest: float
    slowest: float
    repeats: int
    samples: tuple[float, ...] = ()

    @classmethod
    def of(cls, seconds: list[float]) -> Latency:
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds), tuple(seconds))


def wall_clock(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cuda_events(work: Callable[[], object]) -> float:
    """Seconds that one call keeps the current CUDA stream busy."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def graphed(work: Callable[[], object]) -> Callable[[], object]:
    """The same work as a CUDA graph, whose replay takes no host time; each replay overwrites the results.

    The work is called a few times before capture, since first calls compile, load or choose things.
    """
    import torch

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()

    def replay():
        graph.replay()
        return results

    replay.work = work  # what the graph reads, which is not its own, must stay in memory
    return replay


def measure(work: Callable[[], object], **limits) -> Latency:
    """:func:`compare` for one piece of work."""
    return compare({"": work}, **limits)[""]


def compare(
    works: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 1,
    min_repeats: int = 3,
    max_repeats: int = 50,
    min_seconds: float = 0.5,
    synchronize: Callable[[], object] = lambda: None,
    clock: Callable[[Callable[[], object]], float] = wall_clock,
) -> dict[str, Latency]:
    """Time several pieces of work in turn, one call of each per round, so that machine drift affects all alike.

    Rounds continue until each work has been called ``min_repeats`` times and for ``min_seconds`` in total, or
    ``max_repeats`` times.

    Args:
        works: callables without arguments, by name.
        warmup: calls of each before the first timed one.
        synchronize: waits for the device, e.g. ``torch.cuda.synchronize``; called before each call and within its time.
        clock: returns the seconds of one call: :func:`wall_clock`, or :func:`cuda_events` for work on a CUDA device.
    """
    if min_repeats < 1 or max_repeats < min_repeats:
        raise ValueError(f"1 <= min_repeats <= max_repeats is wanted, got {min_repeats} and {max_repeats}")
    for work in works.values():
        for _ in range(warmup):
            work()
    seconds: dict[str, list[float]] = {name: [] for name in works}

    def unfinished(taken: list[float]) -> bool:
        return len(taken) < min_repeats or (sum(taken) < min_seconds and len(taken) < max_repeats)

    while any(unfinished(taken) for taken in seconds.values()):
        for name, work in works.items():
            if unfinished(seconds[name]):
                synchronize()
                seconds[name].append(clock(lambda work=work: (work(), synchronize())))
    return {name: Latency.of(taken) for name, taken in seconds.items()}
