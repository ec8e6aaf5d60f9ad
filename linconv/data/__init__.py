"""Recorded speech, or sentences, as training data: a folder with tables, or a data set of the hub."""

from linconv.data.collate import Collator, SentenceCollator
from linconv.data.sources import Splits, load_splits
from linconv.data.text import build_tokenizer, normalize

__all__ = ["Collator", "SentenceCollator", "Splits", "build_tokenizer", "load_splits", "normalize"]
