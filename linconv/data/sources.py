"""Sources of clips. A clip is ``{"audio": float32 samples, "target": transcript or class name}``."""

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from linconv.data.audio import duration, read_audio
from linconv.data.documents import Blocks, load_documents
from linconv.data.holdout import SPLITS, hold_out
from linconv.data.hub import class_name, class_names, load_from_hub
from linconv.data.sentences import Sentences, load_sentences
from linconv.data.tables import read_table
from linconv.errors import UserError, first_of, may_be_on_hub, no_folder, unknown
from linconv.recipe import Data

__all__ = ["AudioClips", "AudioStream", "HubClips", "Splits", "durations", "load_splits"]


class AudioClips(torch.utils.data.Dataset):
    """Clips by index: ``files`` are paths, read on access."""

    classes = None  # a table does not list them

    def __init__(self, files: list[Path], targets: list[str], sampling_rate: int):
        self.files, self.targets, self.sampling_rate = files, targets, sampling_rate

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> dict:
        return {"audio": read_audio(self.files[i], self.sampling_rate), "target": self.targets[i]}

    def sounds(self) -> Iterator[Path]:
        """Yields the file of each clip, unread."""
        return iter(self.files)

    def name(self, i: int) -> str:
        return str(self.files[i])


class HubClips(torch.utils.data.Dataset):
    """Clips by index from a data set on the hub."""

    def __init__(self, dataset, data: Data, target: str):
        self.dataset, self.data = dataset, data
        self.targets = [class_name(dataset.features[target], value) for value in dataset[target]]
        self.classes = class_names(dataset.features[target])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict:
        audio = read_audio(_hub_sound(self.dataset[i], self.data), self.data.sampling_rate)
        return {"audio": audio, "target": self.targets[i]}

    def sounds(self) -> Iterator[bytes | str]:
        """Yields the bytes or the path of each clip, not decoded."""
        return (_hub_sound(row, self.data) for row in self.dataset)

    def name(self, i: int) -> str:
        return f"number {i + 1:,}"


class AudioStream(torch.utils.data.IterableDataset):
    """Clips in sequence from a streamed data set on the hub; targets are not known in advance.

    ``edit`` is applied to each target as it arrives.
    """

    targets = None

    def __init__(self, dataset, data: Data, target: str):
        self.dataset, self.data, self.target = dataset, data, target
        self.edit: Callable[[str], str] = str
        self.classes = class_names(dataset.features[target])

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        feature = self.dataset.features[self.target]
        for row in self.dataset:
            for column in (self.data.audio, self.target):
                if row[column] is None:
                    raise UserError(f"data: column {column!r}: null in a row of the stream; want a value in every row")
            audio = read_audio(_hub_sound(row, self.data), self.data.sampling_rate)
            yield {"audio": audio, "target": self.edit(class_name(feature, row[self.target]))}


@dataclass
class Splits:
    """The clips, sentences or documents of a task.

    ``labels`` are the classes to train on, in the data set's order if it lists them, else sorted; None if a task has
    none. Documents are :class:`Sentences` until there is a tokenizer, then :class:`Blocks`.
    """

    train: AudioClips | HubClips | AudioStream | Sentences | Blocks | None
    validation: AudioClips | HubClips | AudioStream | Sentences | Blocks | None
    test: AudioClips | HubClips | AudioStream | Sentences | Blocks | None
    labels: list[str] | None

    def __getitem__(self, split: str):
        return getattr(self, split)


def load_splits(data: Data, task: str) -> Splits:
    """Loads the three splits that ``data`` describes, for a ``task`` of a recipe. A split may be missing.

    Raises:
        UserError: something that ``data`` names does not exist; the message names it and the nearest match.
    """
    if data.path is None:
        files = {"text_classification": "one table for each split", "language_modeling": "text for each split"}
        wanted = files.get(task, "a metadata.csv")
        raise UserError(f"data.path: not given; want a folder with {wanted}, or a data set on the hub")
    if task == "language_modeling":
        return Splits(**load_documents(data), labels=None)
    column = "text" if task == "ctc" else "label"
    if getattr(data, column) is None:
        raise UserError(
            f"data.{column}: not given; want the column of the {'transcripts' if task == 'ctc' else 'classes'}"
        )
    folder = Path(data.path)
    if task != "text_classification" and (data.limit or data.max_length):
        raise UserError("data.limit and data.max_length are for text, not for clips")
    if task == "text_classification":
        splits = load_sentences(data)
    elif folder.is_dir():
        splits = _from_folder(folder, data, column)
    elif may_be_on_hub(data.path):
        splits = _from_hub(data, column)
    else:
        raise no_folder("data.path", data.path)
    if data.normalize_text and task == "ctc":
        from linconv.data.text import normalize

        for split in splits.values():
            if isinstance(split, AudioStream):
                split.edit = normalize
            elif split is not None:
                split.targets = [normalize(text) for text in split.targets]
    labels = None if task == "ctc" else _labels(splits)
    return Splits(**splits, labels=labels)


def durations(sounds: Iterable[Path | bytes | str], total: int, shortest: float = 0.0) -> list[float]:
    """Returns the seconds of each sound from its header, with a progress bar; it decodes almost nothing.

    Raises:
        UserError: some are not sound files, have no samples, or are shorter than ``shortest``; the message counts them.
    """
    from tqdm import tqdm

    seconds, wrong = [], []
    for number, sound in enumerate(tqdm(sounds, "headers", total, unit="clip", leave=False, disable=None), 1):
        try:
            seconds.append(duration(sound))
            if seconds[-1] < shortest:
                name = "a clip" if isinstance(sound, bytes) else sound
                raise UserError(f"{name}: {seconds[-1]:g} s; want {shortest:g} s at least, a frame of the model")
        except UserError as error:
            wrong.append(f"number {number}, {error}" if isinstance(sound, bytes) else str(error))
    if wrong:
        raise UserError(f"data: {len(wrong):,} of {total:,} clips cannot be used: {first_of(wrong)}")
    return seconds


def _labels(splits: dict) -> list[str] | None:
    train = splits["train"]
    if train is None:
        return None
    if train.targets is None and train.classes is None:
        raise UserError(f"data.label: the stream's column {train.target!r} does not list its classes")
    labels = train.classes or sorted(set(train.targets))
    for name, split in splits.items():
        strange = sorted(set(split.targets) - set(labels)) if split is not None and split.targets is not None else []
        if strange:
            what = f"{first_of([repr(label) for label in strange])} is among the labels of the split {name}"
            raise UserError(f"data: {what} but not of train")
    return labels


def _from_folder(folder: Path, data: Data, column: str) -> dict:
    table = folder / "metadata.csv"
    if not table.is_file():
        raise UserError(f"{folder}: no metadata.csv in it")
    rows = read_table(table)
    target = getattr(data, column)
    wanted = {f"data.{column}": target, "metadata.csv": "file_name", **{f"data.where.{key}": key for key in data.where}}
    if not data.holdout:
        wanted["data.split_column"] = data.split_column
    for what, name in wanted.items():
        if name not in rows[0]:
            raise unknown(what, name, rows[0])
    for key, value in data.where.items():
        values = value if isinstance(value, list) else [value]
        if any(isinstance(v, bool) for v in values):
            raise UserError(f"data.where.{key}: got {value!r}; put yes and no, true and false into quotes")
        allowed = {str(v) for v in values}
        missing = allowed - {row[key] for row in rows}
        if missing:
            raise unknown(f"data.where.{key}", min(missing), {row[key] for row in rows})
        rows = [row for row in rows if row[key] in allowed]
    names = {split: getattr(data, split) for split in SPLITS}
    if not data.holdout:
        found = Counter(row[data.split_column] for row in rows)
        if data.train not in found:
            raise unknown("data.train", data.train, found)
        _warn_of_other_splits({name: count for name, count in found.items() if name not in names.values()}, data)
        rows = [row for row in rows if row[data.split_column] in names.values()]
    missing = [row["file_name"] for row in rows if not (folder / row["file_name"]).is_file()]
    if missing:
        raise UserError(f"{table}: no file {first_of([repr(name) for name in missing])} in {folder}")
    if data.max_seconds is not None:
        seconds = durations([folder / row["file_name"] for row in rows], len(rows))
        rows = [row for row, length in zip(rows, seconds) if length <= data.max_seconds]
    if data.holdout:
        assigned = _hold_out(rows, target, data)
        names = dict(zip(SPLITS, SPLITS))
    else:
        assigned = [row[data.split_column] for row in rows]
    splits = {}
    for split, name in names.items():
        part = [row for row, where in zip(rows, assigned) if where == name]
        files, targets = [folder / row["file_name"] for row in part], [row[target] for row in part]
        splits[split] = AudioClips(files, targets, data.sampling_rate) if part else None
    return splits


def _warn_of_other_splits(found: dict[str, int], data: Data) -> None:
    """Warns of splits of a table that the recipe does not use: a mistyped name looks the same."""
    if found:
        counts = first_of([f"{count:,} of {name!r}" for name, count in found.items()])
        warnings.warn(
            f"data.split_column: {sum(found.values()):,} rows are left out, for they are of other splits: {counts}; "
            f"want {data.train!r}, {data.validation!r} or {data.test!r} (data.train, data.validation, data.test)",
            stacklevel=2,
        )


def _hold_out(rows: list[dict], target: str, data: Data) -> list[str]:
    """Assigns each row a split: rows of each label, ordered by a hash of their file names, are cut by the shares."""

    def draw(row: dict) -> str:
        return hashlib.sha256(f"{data.holdout_seed} {row['file_name']}".encode()).hexdigest()

    # Transcripts rarely repeat: all are one group.
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row[target] if data.label == target else "", []).append(row)
    taken = hold_out((sorted(group, key=draw) for group in groups.values()), data.holdout)
    assigned = {row["file_name"]: split for split, part in taken.items() for row in part}
    return [assigned.get(row["file_name"], "train") for row in rows]


def _from_hub(data: Data, column: str) -> dict:
    if data.where or data.holdout or data.max_seconds:
        raise UserError("data.where, data.holdout and data.max_seconds are for folders, not for data sets on the hub")
    target, splits = getattr(data, column), {}
    columns = {data.audio: "data.audio", target: f"data.{column}"}
    for split, dataset in load_from_hub(data, columns, streaming=data.streaming):
        if dataset is not None:
            if type(dataset.features[data.audio]).__name__ == "Audio":  # get bytes and decode them here
                dataset = dataset.cast_column(data.audio, type(dataset.features[data.audio])(decode=False))
            dataset = (AudioStream if data.streaming else HubClips)(dataset, data, target)
        splits[split] = dataset
    return splits


def _hub_sound(row: dict, data: Data) -> bytes | str:
    clip = row[data.audio]
    return clip["bytes"] if clip.get("bytes") else clip["path"]
