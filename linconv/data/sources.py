"""Where clips come from. A clip is ``{"audio": float32 samples, "target": what is said or who or which}``."""

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from linconv.data.audio import read_audio
from linconv.data.holdout import hold_out
from linconv.data.hub import class_name, load_from_hub
from linconv.data.sentences import Sentences, load_sentences
from linconv.errors import UserError, may_be_on_hub, no_folder, unknown
from linconv.recipe import Data

__all__ = ["AudioClips", "AudioStream", "Splits", "load_splits"]

SPLITS = ("train", "validation", "test")


class AudioClips(torch.utils.data.Dataset):
    """Clips by index: ``files`` are paths, read when asked for."""

    def __init__(self, files: list[Path], targets: list[str], sampling_rate: int):
        self.files, self.targets, self.sampling_rate = files, targets, sampling_rate

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> dict:
        return {"audio": read_audio(self.files[i], self.sampling_rate), "target": self.targets[i]}


class HubClips(torch.utils.data.Dataset):
    """Clips by index from a data set of the hub."""

    def __init__(self, dataset, data: Data, target: str):
        self.dataset, self.data = dataset, data
        self.targets = [class_name(dataset.features[target], value) for value in dataset[target]]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict:
        return {"audio": _hub_audio(self.dataset[i], self.data), "target": self.targets[i]}


class AudioStream(torch.utils.data.IterableDataset):
    """Clips one after the other from a streamed data set of the hub; its targets are not known beforehand."""

    targets = None

    def __init__(self, dataset, data: Data, target: str):
        self.dataset, self.data, self.target = dataset, data, target

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        feature = self.dataset.features[self.target]
        for row in self.dataset:
            yield {"audio": _hub_audio(row, self.data), "target": class_name(feature, row[self.target])}


@dataclass
class Splits:
    """The clips or sentences of a task; ``labels`` are the sorted classes to train on, None for transcripts."""

    train: AudioClips | HubClips | AudioStream | Sentences | None
    validation: AudioClips | HubClips | AudioStream | Sentences | None
    test: AudioClips | HubClips | AudioStream | Sentences | None
    labels: list[str] | None

    def __getitem__(self, split: str):
        return getattr(self, split)


def load_splits(data: Data, task: str) -> Splits:
    """The three splits that ``data`` describes, for a ``task`` as in a recipe. A split may be missing.

    Raises:
        UserError: something that ``data`` names is not there; the message says what and what comes nearest.
    """
    if data.path is None:
        table = "one table for each split" if task == "text_classification" else "a metadata.csv"
        raise UserError(f"data.path: not given; want a folder with {table}, or a data set on the hub")
    column = "text" if task == "ctc" else "label"
    if getattr(data, column) is None:
        raise UserError(
            f"data.{column}: not given; want the column of the {'transcripts' if task == 'ctc' else 'classes'}"
        )
    folder = Path(data.path)
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
            if split is not None and split.targets is not None:
                split.targets = [normalize(text) for text in split.targets]
    labels = None if task == "ctc" else _labels(splits)
    return Splits(**splits, labels=labels)


def _labels(splits: dict) -> list[str] | None:
    train = splits["train"]
    if train is None:
        return None
    if train.targets is None:
        feature = train.dataset.features[train.target]
        if not hasattr(feature, "names"):
            raise UserError(f"data.label: the stream's column {train.target!r} does not list its classes")
        return list(feature.names)
    labels = sorted(set(train.targets))
    for name, split in splits.items():
        strange = sorted(set(split.targets) - set(labels)) if split is not None and split.targets is not None else []
        if strange:
            raise UserError(f"data: {strange[0]!r} is among the labels of the split {name} but not of train")
    return labels


def _from_folder(folder: Path, data: Data, column: str) -> dict:
    table = folder / "metadata.csv"
    if not table.is_file():
        raise UserError(f"{folder}: no metadata.csv in it")
    with open(table, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise UserError(f"{table}: no rows in it")
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
    if data.max_seconds is not None:
        import soundfile

        rows = [row for row in rows if soundfile.info(_file(folder, row)).duration <= data.max_seconds]
    if data.holdout:
        assigned = _hold_out(rows, target, data)
        names = dict(zip(SPLITS, SPLITS))
    else:
        assigned = [row[data.split_column] for row in rows]
        names = {split: getattr(data, split) for split in SPLITS}
        if names["train"] not in assigned:
            raise unknown("data.train", names["train"], set(assigned))
    splits = {}
    for split, name in names.items():
        part = [row for row, where in zip(rows, assigned) if where == name]
        files, targets = [_file(folder, row) for row in part], [row[target] for row in part]
        splits[split] = AudioClips(files, targets, data.sampling_rate) if part else None
    return splits


def _file(folder: Path, row: dict) -> Path:
    file = folder / row["file_name"]
    if not file.is_file():
        raise UserError(f"{folder / 'metadata.csv'}: no file {row['file_name']!r} in {folder}")
    return file


def _hold_out(rows: list[dict], target: str, data: Data) -> list[str]:
    """A split for each row: within each label, the rows in an order drawn from their names, cut by the shares."""

    def draw(row: dict) -> str:
        return hashlib.sha256(f"{data.holdout_seed} {row['file_name']}".encode()).hexdigest()

    # Transcripts hardly repeat: they are one group.
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
    columns = {"data.audio": data.audio, f"data.{column}": target}
    for split, dataset in load_from_hub(data, columns, streaming=data.streaming):
        if dataset is not None:
            if type(dataset.features[data.audio]).__name__ == "Audio":  # its bytes, which we decode
                dataset = dataset.cast_column(data.audio, type(dataset.features[data.audio])(decode=False))
            dataset = (AudioStream if data.streaming else HubClips)(dataset, data, target)
        splits[split] = dataset
    return splits


def _hub_audio(row: dict, data: Data):
    clip = row[data.audio]
    return read_audio(clip["bytes"] if clip.get("bytes") else clip["path"], data.sampling_rate)
