"""Runs the cases of a suite: checks first, then times in turn, then memory, each within its budget."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from linconv.benchmarking.latency import compare, cuda_events, wall_clock
from linconv.benchmarking.machine import memory_bytes, provenance, rates
from linconv.benchmarking.memory import peak_extra_bytes, peak_extra_cuda_bytes
from linconv.benchmarking.results import Results
from linconv.benchmarking.scaling import fit, predict
from linconv.benchmarking.suite import LARGEST, Absent, Case, CheckFailed, Implementation, Setting, work

__all__ = ["Limits", "run"]

USED_UP = "the time of the runs was used up"
_TRIED = 16, 64  # numbers of frames for trying an implementation
_CHECKED = 8  # most sequences for trying and checking: a larger batch tells no more


@dataclass(frozen=True)
class Limits:
    """Limits of a run.

    seconds: for the whole run. call_seconds, memory_bytes: for one timed call; if shorter lengths suggest that a call
    needs more, it is predicted instead.
    """

    seconds: float = 600.0
    call_seconds: float = 10.0
    memory_bytes: float | None = None


def run(
    results: Results,
    cases: Sequence[Case],
    limits: Limits,
    *,
    measure: Sequence[str] = ("latency", "memory"),
    lengths: Sequence[int] | None = None,
    report: Callable[[str], object] = print,
) -> None:
    """Add the missing measurements of ``cases`` to ``results``; unmeasured values are predicted and marked.

    Args:
        lengths: measure only at these; the cases' other lengths are predicted.
    """
    if not cases:
        return
    device = cases[0].setting.device
    end = time.monotonic() + limits.seconds
    results.forget_predictions([case.key for case in cases])
    found = None
    if "latency" in measure:
        found = rates(device, tuple(sorted({"float32", *(case.setting.dtype for case in cases)})))
        matmul = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in found["matmul"].items())
        report(f"torch.mm: {matmul}; copy: {found['copy'] / 1e9:.1f} GB/s")
    results.runs.append({**provenance(), "device": device, "seed": cases[0].setting.seed, "rates": found})
    runner = _Runner(results, limits, end, found, report)
    for case in cases:
        results.cases[case.key] = case.describe()
        if time.monotonic() < end:
            runner.case(case, measure, lengths or case.lengths)
    runner.predict(cases)


class _Runner:
    def __init__(self, results, limits, end, found, report):
        self.results, self.limits, self.end, self.rates, self.report = results, limits, end, found, report
        self.why: dict[tuple[str, str, int, str], str] = {}  # why a value was not measured
        self.tried: dict[tuple[str, str], _Tried] = {}

    def case(self, case: Case, measure: Sequence[str], lengths: Sequence[int]) -> None:
        lengths = sorted(lengths)
        if all(
            self._has(case, i, length, what) for i in case.implementations for length in lengths for what in measure
        ):
            return
        self.report(f"{case.key}")
        usable = [i for i in case.implementations if self._usable(case, i, lengths)]
        if "latency" in measure:
            for length in lengths:
                self._latency(case, usable, length)
        if "memory" in measure:
            for length in lengths:
                for implementation in usable:
                    self._memory(case, implementation, length)
        for implementation in case.implementations:  # without any measurement there is nothing to predict from
            why = self.why.get((case.key, implementation.name, lengths[0], "seconds"))
            if why and not self.results.values(case.key, implementation.name, "seconds")[0]:
                self.report(f"  {implementation.name} is not timed at any length: {why}")

    def _has(self, case, implementation, length, measure) -> bool:
        row = self.results.rows.get((case.key, implementation.name, length), {})
        return ("samples" if measure == "latency" else "extra_bytes") in row

    def _usable(self, case: Case, implementation: Implementation, lengths: Sequence[int]) -> bool:
        """Run its check and short calls of it; record it as absent or failed if one fails."""
        name, setting = implementation.name, _short(case.setting)
        if time.monotonic() > self.end:
            for length in lengths:
                for what in ("seconds", "extra_bytes"):
                    self.why[case.key, name, length, what] = USED_UP
            return False
        try:
            if implementation.reason:
                raise Absent(implementation.reason)
            torch.manual_seed(setting.seed)
            if implementation.check is not None:
                implementation.check(setting)
            make, arguments = implementation.make, implementation.arguments
            if implementation.shortcut is not None:
                arguments = implementation.shortcut.arguments
            self.tried[case.key, name] = _Tried.of(make, arguments, setting)
        except Absent as absent:
            self.results.absent[name] = str(absent)
            return False
        except CheckFailed as failed:
            self.results.failed[f"{case.key}: {name}"] = str(failed)
            self.results.forget(case.key, name)  # results of earlier runs, in which it passed
            self.report(f"  {name} FAILED its check, no speed is reported: {failed}")
            return False
        except Exception as error:
            if implementation.ours:
                raise
            # A peer that cannot run this: its error message is the reason.
            self.results.absent[f"{name} ({case.key})"] = _in_short(error)
            return False
        self.results.failed.pop(f"{case.key}: {name}", None)
        for key in (name, f"{name} ({case.key})"):
            self.results.absent.pop(key, None)
        return True

    # ---- Batches

    def _setting(self, case: Case, implementation: Implementation, length: int) -> Setting:
        """The case's setting, with the batch as a number."""
        if case.setting.batch != LARGEST:
            return case.setting
        row = self._row(case, implementation, length)
        if "batch" not in row:
            row["batch"] = self._largest(_of_one(case.setting), implementation, length)
        return case.setting.with_batch(row["batch"])

    def _sequences(self, case: Case, implementation: Implementation, length: int) -> int:
        """The factor from one sequence's time and memory to those of a call."""
        return self._setting(case, implementation, length).batch if case.setting.batch == LARGEST else 1

    def _largest(self, one: Setting, implementation: Implementation, length: int) -> int:
        """The largest power of two of sequences within the memory and time limits of one call."""
        arguments = _arguments(implementation, length)
        call = work(implementation.make, arguments, one, length)
        _, leaves = implementation.make(one, length, *arguments)
        bytes_of_one = self._extra_bytes(one, implementation, length) + sum(leaf.nbytes for leaf in leaves)
        taken = compare({"": call}, clock=_clock(one), warmup=1, min_repeats=1, max_repeats=1)[""]
        by_memory = self._memory_limit(one) / max(bytes_of_one, 1)
        by_time = self.limits.call_seconds / taken.median
        return 2 ** max(0, math.floor(math.log2(min(by_memory, by_time))))

    # ---- Latency

    def _latency(self, case: Case, usable: list[Implementation], length: int) -> None:
        if all(self._has(case, i, length, "latency") for i in usable):
            return

        def give_up(group, why):
            for implementation in group:
                self.why[case.key, implementation.name, length, "seconds"] = why

        if time.monotonic() > self.end:  # before trying anything of this length
            return give_up(usable, USED_UP)
        group, expected = [], {}
        for implementation in usable:
            beyond = self._beyond(case, implementation, length) or self._fails(case, implementation, length)
            if beyond:
                give_up([implementation], beyond)
            else:
                group.append(implementation)
                sequences = self._sequences(case, implementation, length)
                expected[implementation.name] = sequences * self._call_seconds(case, implementation, length)
        slowest = max(expected.values(), default=0.0)
        repeats = _repeats(slowest)
        need = sum(expected.values()) * (repeats["min_repeats"] + repeats["warmup"] + 0.5)
        if not group or time.monotonic() + need > self.end:
            return give_up(group, USED_UP)
        try:
            taken = self._compare(case, group, length, repeats)
        except torch.OutOfMemoryError as error:  # each fits, but not beside the inputs of the others
            return give_up(group, _in_short(error))
        said = []
        for implementation in group:
            samples, composed = taken[implementation.name]
            sequences = self._sequences(case, implementation, length)
            samples = [sample / sequences for sample in samples]
            row = self._row(case, implementation, length)
            row.update(seconds=statistics.median(samples), samples=samples, run=len(self.results.runs) - 1)
            if implementation.cost is not None:
                cost = implementation.cost(self._setting(case, implementation, length), length)
                row["floor_seconds"] = cost.seconds(self.rates) / sequences
            if composed:
                row["composed"] = True
            said.append(f"{implementation.name} {row['seconds'] * 1e3:,.2f} ms")
        self.report(f"  {length:>7,} {case.unit}: " + "; ".join(said))

    def _fails(self, case: Case, implementation: Implementation, length: int) -> str:
        """Why a trial call does not run on the GPU; "" if it does, and on CPU, where only limits decide."""
        if case.setting.device != "cuda":
            return ""
        try:
            setting = self._setting(case, implementation, length)
            work(implementation.make, _arguments(implementation, length), setting, length)()
            torch.cuda.synchronize()
            return ""
        except Exception as error:
            if not _excused(implementation, error):
                raise
            reason = _in_short(error)
        torch.cuda.empty_cache()
        return reason

    def _compare(self, case, group, length, repeats) -> dict[str, tuple[tuple[float, ...], bool]]:
        """Samples by implementation, all timed in turn, and whether they are composed from one block."""
        works, composed = {}, {}
        for i in group:
            shortcut, setting = i.shortcut, self._setting(case, i, length)
            works[i.name, "whole"] = work(i.make, _arguments(i, length), setting, length)
            if shortcut is not None and length > shortcut.up_to:
                works[i.name, "block"] = work(shortcut.block, shortcut.block_arguments, setting, length)
                composed[i.name] = shortcut.times
        if composed:  # equal numbers: each round makes up one call
            repeats = {**repeats, "min_repeats": repeats["max_repeats"] if length < 1000 else repeats["min_repeats"]}
            repeats["max_repeats"] = repeats["min_repeats"]
        taken = compare(works, clock=_clock(case.setting), **repeats)
        samples = {}
        for i in group:
            whole = taken[i.name, "whole"].samples
            if i.name in composed:
                blocks = taken[i.name, "block"].samples
                whole = tuple(w + composed[i.name] * b for w, b in zip(whole, blocks))
            samples[i.name] = whole, i.name in composed
        return samples

    # ---- Memory

    def _memory(self, case: Case, implementation: Implementation, length: int) -> None:
        if self._has(case, implementation, length, "memory"):
            return
        key = (case.key, implementation.name, length, "extra_bytes")
        beyond = self._beyond(case, implementation, length)
        if not beyond and time.monotonic() > self.end:
            beyond = USED_UP
        if beyond:
            self.why[key] = beyond
            return
        try:
            sequences = self._sequences(case, implementation, length)
            if time.monotonic() + 2 * sequences * self._call_seconds(case, implementation, length) > self.end:
                self.why[key] = USED_UP
                return
            extra = self._extra_bytes(self._setting(case, implementation, length), implementation, length) // sequences
        except Exception as error:
            if not _excused(implementation, error):
                raise
            self.why[key] = _in_short(error)
            return
        self._row(case, implementation, length).update(extra_bytes=extra, memory_run=len(self.results.runs) - 1)
        self.report(f"  {length:>7,} {case.unit}: {implementation.name} {extra / 2**20:,.1f} MiB")

    @staticmethod
    def _extra_bytes(setting: Setting, implementation: Implementation, length: int) -> int:
        arguments = implementation.arguments
        if implementation.shortcut is not None:  # blocks run one after another: one needs as much as all
            arguments = implementation.shortcut.arguments
        setting = replace(setting, graph=False)  # a graph has its memory before it is replayed
        build = functools.partial(warmed, implementation.make, arguments, setting, length)
        if setting.device == "cuda":
            return peak_extra_cuda_bytes(build())
        return peak_extra_bytes(build, preload=(implementation.make.__module__, "transformers"))

    def _memory_limit(self, setting: Setting) -> float:
        return self.limits.memory_bytes or 0.8 * memory_bytes(setting.device)

    def _call_seconds(self, case, implementation, length) -> float:
        """Expected time of one timed call, from shorter lengths."""
        seconds, shortcut = self._expected(case, implementation, "seconds", length), implementation.shortcut
        blocks = shortcut is not None and length > shortcut.up_to  # a model of one layer and a block are timed
        if seconds is not None:
            return seconds / 4 if blocks else seconds
        tried = self.tried.get((case.key, implementation.name))
        if tried is None:
            return 0.0
        times = 1 if shortcut is None else 2 if blocks else 1 + shortcut.times
        return times * tried.seconds(length) * _of_one(case.setting).batch / _short(case.setting).batch

    def _beyond(self, case, implementation, length) -> str | None:
        """Which limit a call at ``length`` would exceed, or None."""
        seconds, most = self._call_seconds(case, implementation, length), self.limits.call_seconds
        if seconds > most:
            return f"a call would take about {seconds:,.0f} s, the limit is {most:g} s"
        limit = self._memory_limit(case.setting)
        extra = self._expected(case, implementation, "extra_bytes", length) or 0
        if implementation.memory is not None:  # known, and possibly more than a fit of short lengths
            extra = max(extra, implementation.memory(_of_one(case.setting), length))
        if tried := self.tried.get((case.key, implementation.name)):
            extra = max(extra, tried.input_bytes * _of_one(case.setting).batch * length)  # at least the inputs
        if extra > limit:
            return f"it would need about {extra / 2**30:,.0f} GiB, the limit is {limit / 2**30:,.0f} GiB"
        return None

    # ---- Rows

    def _expected(self, case, implementation, what, length) -> float | None:
        return self.results.expected(case.key, implementation.name, what, length, implementation.degree)

    def _row(self, case: Case, implementation: Implementation, length: int) -> dict:
        row = self.results.row(case.key, implementation.name, length)
        row.update(ours=implementation.ours, degree=implementation.degree)
        return row

    def predict(self, cases: Sequence[Case]) -> None:
        """Predict missing values from the measured lengths, with the reason."""
        for case in cases:
            for implementation in case.implementations:
                for what in ("seconds", "extra_bytes"):
                    lengths, values = self.results.values(case.key, implementation.name, what)
                    if not lengths:
                        continue
                    enough = len(lengths) > implementation.degree
                    terms = fit(lengths, [max(v, 1e-9) for v in values], implementation.degree)
                    for length in sorted(set(case.lengths) - set(lengths)):
                        why = self.why.get((case.key, implementation.name, length, what))
                        why = why or self._beyond(case, implementation, length) or "not measured in these runs"
                        row = self._row(case, implementation, length)
                        row[f"{what}_predicted"] = why
                        # A fit is no use below the shortest length or with fewer values than terms.
                        row[what] = predict(terms, length) if enough and length > min(lengths) else None


def _excused(implementation: Implementation, error: Exception) -> bool:
    """Whether the error excuses a missing measurement: too little memory, or any failure of a peer."""
    return isinstance(error, torch.OutOfMemoryError) or not implementation.ours


def _in_short(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def _of_one(setting: Setting) -> Setting:
    """The setting itself; for a largest batch, that of one sequence."""
    return setting.with_batch(1) if setting.batch == LARGEST else setting


def _short(setting: Setting) -> Setting:
    """The setting for trying and checking, with few sequences."""
    one = _of_one(setting)
    return one.with_batch(min(one.batch, _CHECKED))


@dataclass(frozen=True)
class _Tried:
    """Results of two short calls, to judge the first length: the seconds of each, and input bytes per frame of a
    sequence."""

    taken: tuple[float, float]
    input_bytes: float

    @classmethod
    def of(cls, make: Callable, arguments: tuple, setting: Setting) -> _Tried:
        """Call each twice, so that loading and compiling at first use are not timed."""
        sizes = []

        def noting(*given):
            function, leaves = make(*given)
            sizes.append(sum(leaf.nbytes for leaf in leaves))
            return function, leaves

        works = {length: work(noting, arguments, setting, length) for length in _TRIED}
        taken = compare(works, clock=_clock(setting), min_repeats=1, max_repeats=1)
        grown = (sizes[1] - sizes[0]) / (_TRIED[1] - _TRIED[0])  # the size of weights does not depend on the length
        return cls(tuple(taken[length].median for length in _TRIED), grown / setting.batch)

    def seconds(self, length: int) -> float:
        """Linear extrapolation; at least the time of the shorter call."""
        (short, long), (few, more) = self.taken, _TRIED
        return short + max(0.0, long - short) * max(0, length - few) / (more - few)


def _arguments(implementation: Implementation, length: int) -> tuple:
    shortcut = implementation.shortcut
    return implementation.arguments if shortcut is None or length <= shortcut.up_to else shortcut.arguments


def _clock(setting: Setting) -> Callable:
    return cuda_events if setting.device == "cuda" else wall_clock


def warmed(make, arguments, setting, length):
    """The work at ``length``, after a short one has loaded and compiled what first use needs."""
    work(make, arguments, setting, min(64, length))()
    return work(make, arguments, setting, length)


def _repeats(seconds: float) -> dict:
    """Warm-up and repeats for calls of about this duration."""
    if seconds < 1:
        return {"warmup": 1, "min_repeats": 5, "max_repeats": 15, "min_seconds": 0.3}
    if seconds < 4:
        return {"warmup": 1, "min_repeats": 3, "max_repeats": 3, "min_seconds": 0.0}
    return {"warmup": 0, "min_repeats": 2, "max_repeats": 2, "min_seconds": 0.0}
