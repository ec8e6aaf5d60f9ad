"""Recorded speech for the demo, as an audio folder of one-second clips.

The recordings are the telephone prompts of Debian's ``asterisk-core-sounds`` packages: the same sentences read in five
languages. ``apt-get download`` downloads the packages and ``dpkg -x`` unpacks them; neither needs root. If that fails,
MInDS-14 (the same five languages, over the telephone) is downloaded from the Hugging Face hub.

The result has the format that every linconv command reads: audio files and a ``metadata.csv`` with ``file_name``, label
columns (``language``, ``prompt``) and ``split``. A prompt is in one split only, the same for all languages, so held-out
clips never repeat trained words.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

SAMPLE_RATE = 16_000
LANGUAGES = {"en": "en-US", "es": "es-ES", "fr": "fr-FR", "it": "it-IT", "ru": "ru-RU"}  # package suffix: hub name
SPLITS = {"test": 0.3, "validation": 0.1, "train": 0.6}  # shares of the prompts


@dataclass(frozen=True)
class Source:
    """Where recordings come from, and the licence and credit to state wherever they are used."""

    name: str
    licence: str
    credit: str


ASTERISK = Source(
    name="Asterisk core sounds (Debian packages asterisk-core-sounds-{en,es,fr,it,ru}-wav)",
    licence="CC BY-SA 3.0 (en, es, fr), CC BY 3.0 (it, ru)",
    credit="Recorded by Allison Smith (en, es), June Wallack (fr), Carlo Flora (it) and provided by Maxim Topal (ru), "
    "with contributions by Digium; cut into one-second clips and resampled to 16 kHz",
)
MINDS14 = Source(
    name="MInDS-14 (PolyAI/minds14 on the Hugging Face hub)",
    licence="CC BY 4.0",
    credit="Gerz et al., Multilingual and Cross-Lingual Intent Detection from Spoken Data (2021); "
    "cut into one-second clips and resampled to 16 kHz",
)


@dataclass(frozen=True)
class Recording:
    """One utterance: mono float32 samples at ``rate``, its language, and the name of its prompt."""

    language: str
    prompt: str
    samples: np.ndarray  # (frames,)
    rate: int


class FetchError(RuntimeError):
    """No source of recordings worked; the message lists those tried and why each failed."""


def default_folder() -> Path:
    """``$LINCONV_CACHE/demo-speech``, or the same under the user's cache folder."""
    cache = os.environ.get("LINCONV_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "linconv"
    )
    return Path(cache) / "demo-speech"


def fetch(folder: str | Path | None = None, *, clips: dict[str, int] | None = None, seed: int = 0) -> Path:
    """Downloads and cuts the recordings, writes the audio folder and returns it; a finished folder is reused.

    Args:
        folder: where to write; :func:`default_folder` if None.
        clips: clips per language in each split; ``{"train": 120, "validation": 40, "test": 200}`` if None.
        seed: decides the split of each prompt, and which recordings are used first.

    Raises:
        FetchError: neither the Debian packages nor the hub worked.
    """
    folder = Path(folder) if folder is not None else default_folder()
    clips = dict(clips or {"train": 120, "validation": 40, "test": 200})
    wanted = {"clips": clips, "seed": seed, "version": 1}
    stamp = folder / "source.json"
    if stamp.is_file() and json.loads(stamp.read_text())["wanted"] == wanted:
        return folder
    failures = []
    for source, read in ((ASTERISK, _asterisk_recordings), (MINDS14, _minds14_recordings)):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            try:
                recordings = list(read(Path(scratch)))
            except FetchError as error:
                failures.append(f"{source.name}: {error}")
                continue
            built = Path(scratch) / "built"
            write_audio_folder(built, recordings, clips=clips, seed=seed)
            (built / "source.json").write_text(json.dumps({"wanted": wanted, **asdict(source)}, indent=1))
            if folder.exists():
                shutil.rmtree(folder)
            built.rename(folder)
            return folder
    raise FetchError(
        "no recorded speech could be fetched; give a folder of your own with --data DIR. Tried"
        + "".join(f"\n  {failure}" for failure in failures)
    )


def source_of(folder: str | Path) -> Source | None:
    """Returns the origin that :func:`fetch` recorded for a folder; None for the user's own folders."""
    stamp = Path(folder) / "source.json"
    if not stamp.is_file():
        return None
    noted = json.loads(stamp.read_text())
    return Source(noted["name"], noted["licence"], noted["credit"])


def write_audio_folder(
    folder: Path, recordings: Iterable[Recording], *, clips: dict[str, int], seed: int = 0, seconds: float = 1.0
) -> None:
    """Cuts recordings into clips of ``seconds`` and writes them as FLAC with their ``metadata.csv``.

    Each prompt belongs to one split, drawn from its name and ``seed``. Recordings take turns to give one clip each,
    loudest first, until a language has ``clips[split]``; near-silent clips are skipped. Every clip is scaled to the
    same RMS level, so that loudness does not distinguish languages.

    Raises:
        FetchError: a language has too few clips for a split.
    """
    import soundfile

    pieces: dict[tuple[str, str], list[tuple[int, str, str, np.ndarray, int]]] = defaultdict(list)
    for recording in recordings:
        split = split_of(recording.prompt, seed)
        for turn, piece in enumerate(_cut(recording, seconds)):
            order = _digest(f"{seed}/{recording.language}/{recording.prompt}")
            pieces[recording.language, split].append((turn, order, recording.prompt, piece, recording.rate))

    rows = []
    for (language, split), found in sorted(pieces.items()):
        if len(found) < clips[split]:
            raise FetchError(f"{language} has {len(found)} {split} clips, {clips[split]} wanted")
        (folder / language).mkdir(parents=True, exist_ok=True)
        chosen = sorted(found, key=lambda piece: piece[:2])[: clips[split]]
        for number, (_, _, prompt, piece, rate) in enumerate(chosen):
            name = f"{language}/{split}-{number:03d}.flac"
            soundfile.write(folder / name, _resample(piece, rate), SAMPLE_RATE, subtype="PCM_16")
            rows.append({"file_name": name, "language": language, "prompt": prompt, "split": split})
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["file_name", "language", "prompt", "split"])
        table.writeheader()
        table.writerows(rows)


def split_of(prompt: str, seed: int) -> str:
    """Returns the split of a prompt."""
    draw = int(_digest(f"{seed}/{prompt}")[:8], 16) / 16**8
    for split, share in SPLITS.items():
        if draw < share:
            return split
        draw -= share
    return "train"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _cut(recording: Recording, seconds: float, rms: float = 0.05, floor: float = 0.01) -> list[np.ndarray]:
    """Cuts a recording into consecutive clips, loudest first, at one RMS level; skips near-silent ones."""
    length = round(seconds * recording.rate)
    count = len(recording.samples) // length
    whole = recording.samples[: count * length].reshape(count, length)
    level = np.sqrt(np.mean(whole**2, axis=1))
    order = [index for index in np.argsort(-level, kind="stable") if level[index] >= floor]
    return [whole[index] * (rms / level[index]) for index in order]


def _resample(piece: np.ndarray, rate: int) -> np.ndarray:
    from scipy.signal import resample_poly

    if rate != SAMPLE_RATE:
        common = np.gcd(rate, SAMPLE_RATE)
        piece = resample_poly(piece, SAMPLE_RATE // common, rate // common)
    return np.clip(piece, -1, 1)


def _mono(samples: np.ndarray) -> np.ndarray:
    return samples if samples.ndim == 1 else samples.mean(axis=1)


def _asterisk_recordings(scratch: Path) -> Iterator[Recording]:
    """Downloads and unpacks the Debian packages below ``scratch`` and reads their prompts."""
    import soundfile

    missing = [tool for tool in ("apt-get", "dpkg") if shutil.which(tool) is None]
    if missing:
        raise FetchError(f"{' and '.join(missing)} not found")
    _apt_download([f"asterisk-core-sounds-{language}-wav" for language in LANGUAGES], scratch)
    for language in LANGUAGES:
        [package] = scratch.glob(f"asterisk-core-sounds-{language}-wav_*.deb")
        root = scratch / language
        _run(["dpkg", "-x", str(package), str(root)], cwd=scratch)
        [voice] = (root / "usr/share/asterisk/sounds").iterdir()
        for path in sorted(voice.rglob("*.wav")):
            prompt = path.relative_to(voice).with_suffix("").as_posix()
            samples, rate = soundfile.read(path, dtype="float32")
            yield Recording(language, prompt, _mono(samples), rate)


def _apt_download(packages: list[str], folder: Path) -> None:
    """Runs ``apt-get download``; if that fails, again with its own package lists below ``folder``."""
    try:
        _run(["apt-get", "download", *packages], cwd=folder)
        return
    except FetchError:
        pass
    own = ["-o", f"Dir::State={folder / 'apt-state'}", "-o", f"Dir::Cache={folder / 'apt-cache'}"]
    (folder / "apt-state/lists/partial").mkdir(parents=True)
    (folder / "apt-cache/archives/partial").mkdir(parents=True)
    _run(["apt-get", *own, "update"], cwd=folder)
    _run(["apt-get", *own, "download", *packages], cwd=folder)


def _run(command: list[str], cwd: Path) -> None:
    try:
        subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=600)
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout).strip().splitlines()
        raise FetchError(f"`{' '.join(command[:1] + command[-1:])}` failed: {lines[-1] if lines else error}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FetchError(f"`{command[0]}` failed: {error}") from error


def _minds14_recordings(scratch: Path) -> Iterator[Recording]:
    """Downloads MInDS-14 from the hub with huggingface_hub and reads its parquet files."""
    try:
        import huggingface_hub
        import pyarrow.parquet  # noqa: F401  (checked before hundreds of megabytes are downloaded)
    except ImportError as error:
        raise FetchError(f"the {error.name} package is not installed") from error
    patterns = [f"{name}/*.parquet" for name in LANGUAGES.values()]
    try:
        huggingface_hub.snapshot_download(
            "PolyAI/minds14", repo_type="dataset", allow_patterns=patterns, local_dir=scratch / "minds14"
        )
    except Exception as error:  # the client raises many kinds when offline
        raise FetchError(f"{type(error).__name__}: {error}") from error
    for language, name in LANGUAGES.items():
        for path in sorted((scratch / "minds14" / name).glob("*.parquet")):
            yield from _parquet_recordings(path, language)


def _parquet_recordings(path: Path, language: str) -> Iterator[Recording]:
    """Reads the rows of a hub audio data set: encoded ``audio`` and its ``transcription``."""
    import pyarrow.parquet
    import soundfile

    for row in pyarrow.parquet.read_table(path, columns=["audio", "transcription"]).to_pylist():
        samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        yield Recording(language, f"{language}: {row['transcription']}", _mono(samples), rate)
