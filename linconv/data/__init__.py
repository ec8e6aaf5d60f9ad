"""Training data: recorded speech, sentences or documents from a folder or a data set on the hub."""

from linconv.data.collate import BlockCollator, Collator, SentenceCollator
from linconv.data.documents import Blocks, in_blocks
from linconv.data.sources import Splits, load_splits
from linconv.data.text import build_bpe_tokenizer, build_tokenizer, normalize

__all__ = [
    "BlockCollator",
    "Blocks",
    "Collator",
    "SentenceCollator",
    "Splits",
    "build_bpe_tokenizer",
    "build_tokenizer",
    "in_blocks",
    "load_splits",
    "normalize",
]
