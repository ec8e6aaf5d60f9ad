"""Reading of sound files."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from linconv.errors import UserError

__all__ = ["duration", "read_audio"]


def read_audio(file: str | Path | bytes, sampling_rate: int) -> np.ndarray:
    """Reads a sound file (or the bytes of one) as mono float32 at ``sampling_rate``.

    Raises:
        UserError: it has no samples or non-finite ones, or is not a sound file; the message names it.
    """
    with _opened(file) as sound:
        samples, rate = sound.read(dtype="float32"), sound.samplerate
    if not len(samples):
        raise UserError(f"{_name(file)}: no samples in it")
    if not np.isfinite(samples).all():  # a single one turns every weight into NaN
        raise UserError(f"{_name(file)}: got samples that are NaN or infinite; want finite ones")
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if rate == sampling_rate:
        return samples
    from scipy.signal import resample_poly

    return resample_poly(samples, sampling_rate, rate).astype(np.float32)


def duration(file: str | Path | bytes) -> float:
    """Returns the seconds of sound in a file, from its header; reads the last sample too, which truncated files lack.

    Raises:
        UserError: it has no samples, is truncated, or is not a sound file; the message names it.
    """
    with _opened(file) as sound:
        if not sound.frames:
            raise UserError(f"{_name(file)}: no samples in it")
        if sound.seekable():
            sound.seek(sound.frames - 1)
            sound.read(1)
        return sound.frames / sound.samplerate


@contextmanager
def _opened(file: str | Path | bytes) -> Iterator:
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(file) if isinstance(file, bytes) else str(file)) as sound:
            yield sound
    except soundfile.LibsndfileError as error:
        raise UserError(f"{_name(file)}: not a sound file that can be read: {error}") from error


def _name(file: str | Path | bytes) -> str:
    return "a clip" if isinstance(file, bytes) else str(file)
