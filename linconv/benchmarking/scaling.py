"""Interpolation and extrapolation of measurements at several lengths."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

__all__ = ["crossover", "crossover_interval", "exponent", "fit", "fit_quadratic", "interval", "predict"]


def fit(lengths: Sequence[float], values: Sequence[float], degree: int = 2) -> tuple[float, float, float]:
    """``(a, b, c) >= 0`` with value = a + b·length + c·length² closest in relative error; c = 0 for degree 1.

    The terms are a call's fixed cost, the work per frame, and attention between all pairs of frames; none can be
    negative, which keeps the fit honest beyond the last measurement. With fewer values than terms, the terms of lowest
    degree are left out, which predicts more than a fit of all would.
    """
    from scipy.optimize import nnls

    lengths, values = np.asarray(lengths, float), np.asarray(values, float)
    if not len(lengths) == len(values) > 0:
        raise ValueError(f"lengths, values: as many of each are wanted, got {len(lengths)}, {len(values)}")
    powers = np.arange(degree + 1)[-len(lengths) :]
    scale = lengths.max()  # keeps the columns similar in size
    columns = (lengths[:, None] / scale) ** powers
    solution, _ = nnls(columns / values[:, None], np.ones_like(values))
    terms = [0.0, 0.0, 0.0]
    for power, term in zip(powers, solution):
        terms[power] = float(term / scale**power)
    return tuple(terms)


def fit_quadratic(lengths: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """:func:`fit` of degree 2, to at least as many values as it has terms."""
    if len(lengths) < 3:
        raise ValueError(f"lengths: at least 3 are needed to fit 3 terms, got {len(lengths)}")
    return fit(lengths, values)


def predict(terms: tuple[float, float, float], length: float) -> float:
    """The value of a :func:`fit` at ``length``."""
    a, b, c = terms
    return a + b * length + c * length**2


def exponent(lengths: Sequence[float], values: Sequence[float], last: int = 4) -> float | None:
    """The power of length by which values grow over the ``last`` lengths; None for fewer than two."""
    if len(lengths) < 2:
        return None
    x, y = np.log(np.asarray(lengths[-last:], float)), np.log(np.asarray(values[-last:], float))
    return float(np.polyfit(x, y, 1)[0])


def crossover(lengths: Sequence[float], original: Sequence[float], converted: Sequence[float]) -> float | None:
    """The length from which ``converted`` stays below ``original``, log-log interpolated between measured lengths.

    Returns ``lengths[0]`` if it is below everywhere and None if it is not below at the longest length.
    """
    if not len(lengths) == len(original) == len(converted) > 0:
        raise ValueError("lengths, original and converted: equally many values of each are wanted, and at least one")
    if any(later <= earlier for earlier, later in zip(lengths, lengths[1:], strict=False)):
        raise ValueError(f"lengths: must increase, got {list(lengths)}")
    gap = np.log(np.asarray(converted, float)) - np.log(np.asarray(original, float))
    above = np.flatnonzero(gap >= 0)
    if len(above) == 0:
        return float(lengths[0])
    last = above[-1]
    if last == len(gap) - 1:
        return None
    share = gap[last] / (gap[last] - gap[last + 1])
    low, high = np.log(lengths[last]), np.log(lengths[last + 1])
    return float(np.exp(low + share * (high - low)))


def crossover_interval(
    lengths: Sequence[float],
    original: Sequence[Sequence[float]],
    converted: Sequence[Sequence[float]],
    *,
    degrees: tuple[int, int] = (2, 1),
    draws: int = 400,
    seed: int = 0,
) -> tuple[float | None, float | None]:
    """The middle 95 % of :func:`crossover` over bootstrap draws of the repeats at each length.

    Args:
        original, converted: the repeats at each length; none where the value is to be predicted from the others by a
            :func:`fit` of that degree in ``degrees``.

    Returns:
        Low and high end; None for "not within these lengths".
    """
    generator = np.random.default_rng(seed)
    sides = list(zip((original, converted), degrees))
    found = [
        crossover(lengths, *(_resampled(lengths, side, degree, generator) for side, degree in sides))
        for _ in range(draws)
    ]
    ordered = sorted(np.inf if value is None else value for value in found)
    ends = ordered[int(0.025 * draws)], ordered[min(draws - 1, int(0.975 * draws))]
    return tuple(None if np.isinf(end) else float(end) for end in ends)


def interval(
    above: Sequence[float], below: Sequence[float], *, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The middle 95 % of the ratio of medians, ``above`` over ``below``, over bootstrap draws of both."""
    generator = np.random.default_rng(seed)
    draw = [np.median(generator.choice(np.asarray(side, float), (draws, len(side))), axis=1) for side in (above, below)]
    low, high = np.quantile(draw[0] / draw[1], (0.025, 0.975))
    return float(low), float(high)


def _resampled(lengths, samples, degree, generator) -> list[float]:
    values = [statistics.median(generator.choice(s, len(s))) if len(s) else None for s in samples]
    measured = [(length, value) for length, value in zip(lengths, values) if value is not None]
    if len(measured) == len(values):
        return values
    terms = fit(*zip(*measured), degree)
    return [predict(terms, length) if value is None else value for length, value in zip(lengths, values)]
