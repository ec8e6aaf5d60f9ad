"""What measurements at several lengths say between and beyond them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def fit_quadratic(lengths: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """``(a, b, c) >= 0`` with value = a + b·length + c·length² closest in relative error.

    The three terms are a call's fixed cost, the work per frame, and attention between all pairs of frames; none can
    be negative, which keeps the fit honest beyond the last measurement.
    """
    from scipy.optimize import nnls

    lengths, values = np.asarray(lengths, float), np.asarray(values, float)
    if len(lengths) < 3:
        raise ValueError(f"lengths: at least 3 are needed to fit 3 terms, got {len(lengths)}")
    scale = lengths.max()  # keeps the three columns alike in size
    relative = lengths / scale
    terms = np.stack([np.ones_like(relative), relative, relative**2], axis=1)
    (a, b, c), _ = nnls(terms / values[:, None], np.ones_like(values))
    return float(a), float(b / scale), float(c / scale**2)


def predict(fit: tuple[float, float, float], length: float) -> float:
    """The value of a :func:`fit_quadratic` at ``length``."""
    a, b, c = fit
    return a + b * length + c * length**2


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
