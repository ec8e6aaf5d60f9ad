"""Scores of runs with intervals from paired bootstraps over clips and seeds."""

import numpy as np

from linconv.report.runs import Measure, RunFolder

__all__ = ["LEVEL", "RESAMPLES", "interval_of", "resampled", "retained_of", "score_of"]

RESAMPLES, LEVEL = 10_000, 0.95
DRAWN_AT_ONCE = 1 << 20  # clips; bounds the memory of the resamples


def score_of(clips: np.ndarray, measure: Measure) -> np.ndarray:
    """Returns the score over all clips, from (..., clips, 2)."""
    return measure.of_rate(clips[..., 0].sum(-1) / np.maximum(clips[..., 1].sum(-1), 1))


def resampled(run: RunFolder) -> np.ndarray:
    """Scores each draw of a run's clips, (RESAMPLES,). Runs with equally many clips share draws."""
    count, generator = len(run.clips), np.random.default_rng(0)
    most = max(1, DRAWN_AT_ONCE // count)
    draws = (min(most, RESAMPLES - start) for start in range(0, RESAMPLES, most))
    pieces = [score_of(run.clips[generator.integers(0, count, (some, count))], run.measure) for some in draws]
    return np.concatenate(pieces)


def retained_of(mine, theirs, measure: Measure):
    """Returns the student's share of what the teacher gets right, from two scores; NaN if the teacher gets none."""
    right = measure.share_right(theirs)
    return np.where(right > 0, measure.share_right(mine) / np.where(right > 0, right, 1), np.nan)


def interval_of(draws: list[np.ndarray]) -> list[float] | None:
    """Returns the interval of the mean over seeds, from each seed's draws of clips, (RESAMPLES,); skips NaN means."""
    seeds = np.random.default_rng(1).integers(0, len(draws), (len(draws), RESAMPLES))
    means = np.take_along_axis(np.stack(draws), seeds, axis=0).mean(0)
    means = means[~np.isnan(means)]
    if not len(means):
        return None
    tail = (1 - LEVEL) / 2
    return [float(q) for q in np.quantile(means, [tail, 1 - tail])]
