"""Reading of sound files."""

import io
from pathlib import Path

import numpy as np

__all__ = ["read_audio"]


def read_audio(file: str | Path | bytes, sampling_rate: int) -> np.ndarray:
    """The sound in a file (or in the bytes of one) as mono float32 at ``sampling_rate``.

    Raises:
        ValueError: it holds no samples, or is not a sound file; the message names it.
    """
    import soundfile

    name = "a clip" if isinstance(file, bytes) else str(file)
    try:
        samples, rate = soundfile.read(io.BytesIO(file) if isinstance(file, bytes) else name, dtype="float32")
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{name}: not a sound file that can be read: {error}") from error
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if not len(samples):
        raise ValueError(f"{name}: no samples in it")
    if rate == sampling_rate:
        return samples
    from scipy.signal import resample_poly

    return resample_poly(samples, sampling_rate, rate).astype(np.float32)
