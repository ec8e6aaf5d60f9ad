"""Latency and peak memory of audio models against the length of the audio."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from linconv.benchmarking.latency import compare
from linconv.benchmarking.memory import peak_extra_bytes
from linconv.benchmarking.scaling import fit_quadratic, predict

__all__ = ["Curve", "audio_forward", "latency_curves", "memory_curve"]


@dataclass(frozen=True)
class Curve:
    """One value for each length, and which of them were predicted from a fit to the shorter ones, not measured."""

    lengths: tuple[float, ...]
    values: tuple[float, ...]
    predicted: tuple[bool, ...]


def audio_forward(checkpoint: str, audio: str, samples: int) -> Callable[[], object]:
    """A forward pass of the classifier in folder ``checkpoint`` over the first ``samples`` of an ``.npy`` of audio."""
    import numpy as np
    import torch
    from transformers import AutoModelForAudioClassification, logging

    import linconv.auto  # noqa: F401

    logging.disable_progress_bar()  # bars of loading, in many processes: the caller shows its own
    model = AutoModelForAudioClassification.from_pretrained(checkpoint).eval()
    waveform = torch.from_numpy(np.load(audio, mmap_mode="r")[:samples].copy())[None]  # (1, samples)
    if waveform.shape[1] < samples:
        raise ValueError(f"{audio} holds {waveform.shape[1]} samples, {samples} wanted")

    def forward():
        with torch.inference_mode():
            return model(input_values=waveform).logits

    return forward


def latency_curves(
    checkpoints: Mapping[str, str],
    audio: str,
    seconds: Sequence[float],
    *,
    budget: float,
    sampling_rate: int = 16_000,
    report: Callable[[str], object] = lambda text: None,
) -> dict[str, Curve]:
    """Median seconds of a forward pass of each model at each length; calls of the models alternate.

    From the first length that would exceed the rest of ``budget`` seconds for a model, that model's values are
    predicted from its measured ones.
    """
    values: dict[str, list[float]] = {name: [] for name in checkpoints}
    measured: dict[str, int] = {name: 0 for name in checkpoints}
    for index, length in enumerate(seconds):
        works = {}
        for name, checkpoint in checkpoints.items():
            expected = _extrapolate(seconds[:index], values[name], length)
            if measured[name] == index and expected <= budget:
                works[name] = audio_forward(checkpoint, audio, round(length * sampling_rate))
                budget -= expected
        report(f"latency, {length:g} s of audio")
        longest = max((_extrapolate(seconds[:index], values[name], length) for name in works), default=0)
        short = longest < 1.0  # a call that takes seconds needs neither a warm-up nor many repeats
        taken = compare(works, warmup=int(short), min_repeats=3 if short else 1, min_seconds=0.3, max_repeats=10)
        for name in checkpoints:
            if name in works:
                values[name].append(taken[name].median)
                measured[name] += 1
            else:
                values[name].append(_extrapolate(seconds[:index], values[name], length))
    return {name: _curve(seconds, values[name], measured[name]) for name in checkpoints}


def memory_curve(
    checkpoint: str,
    audio: str,
    seconds: Sequence[float],
    latency: Curve,
    *,
    budget: float,
    sampling_rate: int = 16_000,
    report: Callable[[str], object] = lambda text: None,
) -> Curve:
    """Bytes by which memory rose during a forward pass at each length, each in a separate process.

    Lengths that would exceed the rest of ``budget`` seconds, according to ``latency``, are predicted.
    """
    values: list[float] = []
    measured = 0
    for index, (length, expected) in enumerate(zip(seconds, latency.values, strict=True)):
        if measured == index and expected <= budget:
            report(f"peak memory, {length:g} s of audio")
            values.append(
                peak_extra_bytes(audio_forward, checkpoint, audio, round(length * sampling_rate), preload=_HEAVY)
            )
            measured += 1
            budget -= expected
        else:
            values.append(_extrapolate(seconds[:index], values, length))
    return _curve(seconds, values, measured)


_HEAVY = ("linconv.auto", "linconv.benchmarking.curves", "transformers.models.wav2vec2.modeling_wav2vec2")


def _curve(lengths: Sequence[float], values: Sequence[float], measured: int) -> Curve:
    return Curve(tuple(lengths), tuple(values), tuple(index >= measured for index in range(len(values))))


def _extrapolate(lengths: Sequence[float], values: Sequence[float], length: float) -> float:
    """The value at ``length``: from the fit, or, with fewer than three values, the last one grown with the square."""
    if len(values) < 3:
        return values[-1] * (length / lengths[-1]) ** 2 if values else 0.0
    return predict(fit_quadratic(lengths, values), length)
