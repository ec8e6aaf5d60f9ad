"""Recorded speech as training data: a folder with a ``metadata.csv``, or a data set of the hub."""

from linconv.data.collate import Collator
from linconv.data.sources import Splits, load_splits
from linconv.data.text import build_tokenizer, normalize

__all__ = ["Collator", "Splits", "build_tokenizer", "load_splits", "normalize"]
