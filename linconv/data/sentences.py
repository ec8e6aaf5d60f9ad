"""Sources of sentences. A row is ``{"text": tuple of one or two strings, "target": class name}``."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from linconv.data.holdout import SPLITS, hold_out
from linconv.data.hub import class_name, class_names, load_from_hub
from linconv.data.tables import SEPARATORS, read_table
from linconv.errors import UserError, may_be_on_hub, no_folder, unknown
from linconv.recipe import Data

__all__ = ["FOLDER", "Sentences", "load_rows", "load_sentences"]

FOLDER = "/"  # stands for folders among file suffixes

Reader = Callable[[Path], "Sentences"]


class Sentences(torch.utils.data.Dataset):
    """Rows by index: ``texts`` are tuples of one string, or of two for pair tasks.

    ``targets`` are all empty if a task has no classes. ``classes`` are those that a data set lists, in its order.
    """

    def __init__(self, texts: list[tuple[str, ...]], targets: list[str], classes: list[str] | None = None):
        self.texts, self.targets, self.classes = texts, targets, classes

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> dict:
        return {"text": self.texts[i], "target": self.targets[i]}

    def subset(self, rows: list[int]) -> "Sentences":
        return Sentences([self.texts[i] for i in rows], [self.targets[i] for i in rows], self.classes)


def load_sentences(data: Data) -> dict[str, Sentences | None]:
    """Loads the three splits that ``data`` describes, from a folder with a table for each split or from the hub.

    Raises:
        UserError: something that ``data`` names does not exist; the message names it and the nearest match.
    """
    if data.sentence is None:
        raise UserError("data.sentence: not given; want the column of the text, or a list of two for pairs")
    columns = [data.sentence] if isinstance(data.sentence, str) else data.sentence
    if len(columns) not in (1, 2):
        raise UserError(f"data.sentence: got {len(columns)} columns; want one, or two for pairs")
    return load_rows(data, "data.sentence", columns, label=data.label)


def load_rows(
    data: Data, key: str, columns: list[str], label: str | None = None, readers: dict[str, Reader] | None = None
) -> dict[str, Sentences | None]:
    """Loads the splits and applies the holdout shares and limits that ``data`` names.

    Args:
        key: the recipe key of ``columns``.
        columns: of the text.
        label: the column of the classes; None if there are none.
        readers: readers by file suffix, or ``FOLDER``, besides those of tables.

    Raises:
        UserError: as :func:`load_sentences`.
    """
    if data.where or data.max_seconds or data.streaming:
        raise UserError("data.where, data.max_seconds and data.streaming are for clips, not for text")
    folder = Path(data.path)
    if folder.is_dir():
        read = partial(_read_table, key=key, columns=columns, label=label)
        splits = _from_folder(folder, data, {**dict.fromkeys(SEPARATORS, read), **(readers or {})})
    elif folder.is_file():
        raise UserError(f"data.path: {folder} is a file; want its folder, and data.train={folder.stem}")
    elif may_be_on_hub(data.path):
        splits = _from_hub(data, key, columns, label)
    else:
        raise no_folder("data.path", data.path)
    _hold_out(splits, data)
    for split, most in data.limit.items():
        if split not in SPLITS:
            raise unknown("data.limit", split, SPLITS)
        if most < 1:
            raise UserError(f"data.limit.{split}: got {most}; want a number of rows from 1 up")
        if splits[split] is not None:
            # A smaller limit gives a subset of a larger one.
            splits[split] = splits[split].subset(sorted(_drawn(splits[split], data)[:most]))
    return splits


def _from_folder(folder: Path, data: Data, readers: dict[str, Reader]) -> dict[str, Sentences | None]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        name, kind = (path.name, FOLDER) if path.is_dir() else (path.stem, path.suffix)
        if kind not in readers:
            continue
        if name in found and name in (data.train, data.validation, data.test):
            raise UserError(f"data.path: {found[name]} and {path} are both {name}; want one of them")
        found[name] = path
    splits = {}
    for split in SPLITS:
        name = getattr(data, split)
        if name in found:
            path = found[name]
            splits[split] = readers[FOLDER if path.is_dir() else path.suffix](path)
        elif split == "train":
            kinds = ", ".join("folder" if kind == FOLDER else kind for kind in readers)
            raise unknown(f"data.train: in {folder} ({kinds})", name, found)
        else:
            splits[split] = None
    return splits


def _read_table(table: Path, key: str, columns: list[str], label: str | None) -> Sentences:
    if not columns:
        raise UserError(f"{key}: not given; want the column of the text in {table}")
    rows = read_table(table)
    named = [(key, column) for column in columns] + ([] if label is None else [("data.label", label)])
    for what, name in named:
        if name not in rows[0]:
            raise unknown(f"{what}: columns of {table}", name, rows[0])
    texts = [tuple(row[column].strip() for column in columns) for row in rows]
    return Sentences(texts, ["" if label is None else row[label] for row in rows])


def _from_hub(data: Data, key: str, columns: list[str], label: str | None) -> dict[str, Sentences | None]:
    if not columns:
        raise UserError(f"{key}: not given; want the column of the text")
    splits = {}
    named = {**dict.fromkeys(columns, key), **({} if label is None else {label: "data.label"})}
    for split, dataset in load_from_hub(data, named):
        splits[split] = None
        if dataset is None:
            continue
        labels, names = [""] * len(dataset), None
        if label is not None:
            feature, classes = dataset.features[label], list(dataset[label])
            if min(classes, default=0) == -1:  # GLUE does not publish its test labels
                continue
            labels, names = [class_name(feature, value) for value in classes], class_names(feature)
        splits[split] = Sentences(list(zip(*(dataset[column] for column in columns))), labels, names)
    return splits


def _hold_out(splits: dict, data: Data) -> None:
    """Moves the shares in data.holdout from the training rows to other splits, within each label."""
    train = splits["train"]
    order = _drawn(train, data) if data.holdout else []
    groups = ([i for i in order if train.targets[i] == label] for label in sorted({train.targets[i] for i in order}))
    taken = hold_out(groups, data.holdout)
    for split, rows in taken.items():
        splits[split] = train.subset(sorted(rows))
    if taken:
        gone = set().union(*taken.values())
        splits["train"] = train.subset([i for i in range(len(train)) if i not in gone])


def _drawn(rows: Sentences, data: Data) -> list[int]:
    """Returns row indices in a random order, from a hash of data.holdout_seed, index and text."""

    def draw(i: int) -> str:
        return hashlib.sha256(f"{data.holdout_seed} {i} {rows.texts[i]}".encode()).hexdigest()

    return sorted(range(len(rows)), key=draw)
