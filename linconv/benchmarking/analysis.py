"""Analysis of results: where curves cross, how they grow, where linconv loses. All of it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from linconv.benchmarking.results import Results, Series
from linconv.benchmarking.scaling import crossover, crossover_interval, exponent

__all__ = ["Crossover", "Loss", "crossovers", "growth", "losses", "over_floor", "speedup"]

# How far above its floor an implementation may be before it is reported, by work.
FLOOR_LIMITS = {"forward": 1.3, "training": 1.5, "step": 1.5}


@dataclass(frozen=True)
class Crossover:
    """From which length on ``name`` is faster than ``baseline``; None: not within the lengths of the case.

    low, high: the middle 95 % of bootstrap draws of the repeats. predicted: an end of the interval that it was
    interpolated in is not measured.
    """

    case: str
    name: str
    baseline: str
    length: float | None
    low: float | None
    high: float | None
    predicted: bool
    shortest: int
    longest: int


@dataclass(frozen=True)
class Loss:
    """Where an implementation of linconv is behind: ``ratio`` (> 1) at ``worst``, over ``lengths`` of the case."""

    case: str
    name: str
    what: str  # "time", "memory" or "floor"
    behind: str
    lengths: tuple[int, ...]
    ratio: float
    worst: int
    predicted: bool


def speedup(series: Series, baseline: Series) -> dict[int, float]:
    """The baseline's seconds divided by the series' own, by length."""
    theirs = dict(zip(baseline.lengths, baseline.seconds))
    pairs = ((n, s, theirs.get(n)) for n, s in zip(series.lengths, series.seconds))
    return {n: base / own for n, own, base in pairs if own and base}


def over_floor(series: Series) -> dict[int, float]:
    """Measured seconds over floor seconds, by length."""
    rows = zip(series.lengths, series.seconds, series.floor_seconds, series.predicted)
    return {n: s / floor for n, s, floor, why in rows if s and floor and not why}


def growth(series: Series) -> float | None:
    """The power of length by which the measured seconds grow over the last four lengths."""
    return exponent(*series.measured())


def crossovers(results: Results, only: str | None = None) -> Iterator[Crossover]:
    """Crossovers of linconv's implementations with the case's baseline if it grows with the square; or of one case."""
    for case, description in results.cases.items():
        if only not in (None, case):
            continue
        found = {series.name: series for series in results.series(case)}
        baseline = found.get(description["baseline"])
        if baseline is None or baseline.degree < 2:
            continue
        for series in found.values():
            lengths = sorted(speedup(series, baseline))
            if not series.ours or len(lengths) < 2:
                continue
            sides = [_at(s, lengths) for s in (baseline, series)]
            length = crossover(lengths, *([second for second, _, _ in side] for side in sides))
            ends = crossover_interval(
                lengths, *([samples for _, samples, _ in side] for side in sides),
                degrees=(baseline.degree, series.degree),
            )  # fmt: skip
            nearby = [n for n in lengths if length and n >= length][:1] + [n for n in lengths if length and n < length][
                -1:
            ]
            predicted = any(why for side in sides for n, (_, _, why) in zip(lengths, side) if n in nearby)
            yield Crossover(case, series.name, baseline.name, length, *ends, predicted, lengths[0], lengths[-1])


def _at(series: Series, lengths: list[int]) -> list[tuple]:
    rows = zip(series.lengths, series.seconds, series.samples, series.predicted)
    by_length = {n: (seconds, () if why else samples, why) for n, seconds, samples, why in rows}
    return [by_length[n] for n in lengths]


def losses(results: Results) -> list[Loss]:
    """Everything in which linconv is behind another implementation, or far above its own floor; the worst first."""
    found = []
    for case, description in results.cases.items():
        all_series = list(results.series(case))
        for ours in (series for series in all_series if series.ours):
            for other in (series for series in all_series if not series.ours):
                found += _loss(case, ours, "time", other.name, _ratios(ours, other, "seconds", "predicted"), 1.0)
                bytes_ = _ratios(ours, other, "extra_bytes", "bytes_predicted")
                found += _loss(case, ours, "memory", other.name, bytes_, 1.05)
            floors = {n: (ratio, False) for n, ratio in over_floor(ours).items()}
            found += _loss(case, ours, "floor", "its floor", floors, FLOOR_LIMITS[description["work"]])
    return sorted(found, key=lambda loss: -loss.ratio)


def _ratios(ours: Series, other: Series, what: str, why: str) -> dict[int, tuple[float, bool]]:
    """Our value divided by the other's, and whether either is predicted, by length."""
    sides = [dict(zip(s.lengths, zip(getattr(s, what), getattr(s, why)))) for s in (ours, other)]
    ratios = {}
    for length in sides[0].keys() & sides[1].keys():
        (own, own_why), (theirs, their_why) = sides[0][length], sides[1][length]
        if own and theirs:
            ratios[length] = own / theirs, bool(own_why or their_why)
    return ratios


def _loss(case, ours, what, behind, ratios, limit) -> list[Loss]:
    lost = sorted(n for n, (ratio, _) in ratios.items() if ratio > limit)
    if not lost:
        return []
    worst = max(lost, key=lambda n: ratios[n][0])
    ratio, predicted = ratios[worst]
    return [Loss(case, ours.name, what, behind, tuple(lost), ratio, worst, predicted)]
