"""Where sentences come from. A row is ``{"text": one or two strings, "target": the name of its class}``."""

import csv
import hashlib
from pathlib import Path

import torch

from linconv.data.holdout import hold_out
from linconv.data.hub import class_name, load_from_hub
from linconv.errors import UserError, may_be_on_hub, no_folder, unknown
from linconv.recipe import Data

__all__ = ["Sentences", "load_sentences"]

SPLITS = ("train", "validation", "test")
SEPARATORS = {".tsv": "\t", ".csv": ","}


class Sentences(torch.utils.data.Dataset):
    """Rows by index: ``texts`` are tuples of one string, or of two for tasks about pairs."""

    def __init__(self, texts: list[tuple[str, ...]], targets: list[str]):
        self.texts, self.targets = texts, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> dict:
        return {"text": self.texts[i], "target": self.targets[i]}

    def subset(self, rows: list[int]) -> "Sentences":
        return Sentences([self.texts[i] for i in rows], [self.targets[i] for i in rows])


def load_sentences(data: Data) -> dict[str, Sentences | None]:
    """The three splits that ``data`` describes, from a folder with one table a split or from the hub.

    Raises:
        UserError: something that ``data`` names is not there; the message says what and what comes nearest.
    """
    if data.sentence is None:
        raise UserError("data.sentence: not given; want the column of the text, or a list of two for pairs")
    if data.where or data.max_seconds or data.streaming:
        raise UserError("data.where, data.max_seconds and data.streaming are for clips, not for sentences")
    folder = Path(data.path)
    if folder.is_dir():
        splits = _from_folder(folder, data)
    elif may_be_on_hub(data.path):
        splits = _from_hub(data)
    else:
        raise no_folder("data.path", data.path)
    _hold_out(splits, data)
    for split, most in data.limit.items():
        if split not in SPLITS:
            raise unknown("data.limit", split, SPLITS)
        if most < 1:
            raise UserError(f"data.limit.{split}: got {most}; want a number of rows from 1 up")
        if splits[split] is not None:
            # A smaller limit takes a part of what a larger one takes.
            splits[split] = splits[split].subset(sorted(_drawn(splits[split], data)[:most]))
    return splits


def _columns(data: Data) -> list[str]:
    columns = [data.sentence] if isinstance(data.sentence, str) else data.sentence
    if len(columns) not in (1, 2):
        raise UserError(f"data.sentence: got {len(columns)} columns; want one, or two for pairs")
    return columns


def _from_folder(folder: Path, data: Data) -> dict[str, Sentences | None]:
    tables = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in SEPARATORS}
    splits = {}
    for split in SPLITS:
        name = getattr(data, split)
        if name in tables:
            splits[split] = _read(tables[name], data)
        elif split == "train":
            raise unknown(f"data.train: tables in {folder}", name, tables)
        else:
            splits[split] = None
    return splits


def _read(table: Path, data: Data) -> Sentences:
    with open(table, newline="", encoding="utf-8-sig") as file:
        tabs = table.suffix == ".tsv"  # GLUE's have quotation marks in their text, unpaired ones too
        rows = list(csv.DictReader(file, delimiter=SEPARATORS[table.suffix], quoting=csv.QUOTE_NONE if tabs else 0))
    if not rows:
        raise UserError(f"{table}: no rows in it")
    columns = _columns(data)
    for what, name in [("data.label", data.label), *(("data.sentence", column) for column in columns)]:
        if name not in rows[0]:
            raise unknown(f"{what}: columns of {table}", name, rows[0])
    for number, row in enumerate(rows, 2):
        if any(row[column] is None for column in [*columns, data.label]):
            raise UserError(f"{table}, line {number}: fewer columns than the first line names")
    return Sentences([tuple(row[c].strip() for c in columns) for row in rows], [row[data.label] for row in rows])


def _from_hub(data: Data) -> dict[str, Sentences | None]:
    columns, splits = _columns(data), {}
    named = {"data.label": data.label, **{f"data.sentence: {column}": column for column in columns}}
    for split, dataset in load_from_hub(data, named):
        splits[split] = None
        if dataset is None:
            continue
        feature, labels = dataset.features[data.label], list(dataset[data.label])
        if min(labels, default=0) == -1:  # GLUE keeps the answers of its tests to itself
            continue
        texts = list(zip(*(dataset[column] for column in columns)))
        splits[split] = Sentences(texts, [class_name(feature, label) for label in labels])
    return splits


def _hold_out(splits: dict, data: Data) -> None:
    """Takes the shares that data.holdout names from the training rows, within each label."""
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
    """The rows' indices in an order drawn from their text by data.holdout_seed."""

    def draw(i: int) -> str:
        return hashlib.sha256(f"{data.holdout_seed} {i} {rows.texts[i]}".encode()).hexdigest()

    return sorted(range(len(rows)), key=draw)
