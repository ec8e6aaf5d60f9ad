"""Where documents come from, and blocks of their tokens, which a language model is trained on."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from linconv.data.sentences import FOLDER, Sentences, load_rows
from linconv.data.tables import decoded
from linconv.errors import UserError
from linconv.recipe import Data

__all__ = ["Blocks", "in_blocks", "load_documents"]

CHARACTERS_AT_ONCE = 1 << 20  # to the tokenizer, which keeps far more of each token than its number


class Blocks(torch.utils.data.Dataset):
    """A split's tokens, one document behind the other, in blocks: ``{"input_ids": int32 (L,)}`` by index.

    Each token is in one block. All blocks but the last have ``length`` tokens.

    Args:
        tokens: int32, (tokens,).
        length: of a block.
        documents: that the tokens are of.
    """

    def __init__(self, tokens: np.ndarray, length: int, documents: int):
        self.length, self.documents, self.tokens = length, documents, len(tokens)
        self.blocks = [tokens[start : start + length] for start in range(0, len(tokens), length)]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> dict:
        return {"input_ids": self.blocks[i]}


def load_documents(data: Data) -> dict[str, Sentences | None]:
    """The documents of the three splits that ``data`` describes: rows of one text, without classes.

    A split is a .txt file, whose documents stand apart by blank lines; a folder, each .txt file in which is a document;
    a table, .tsv or .csv, with a document a row; or that of a data set on the hub.

    Raises:
        UserError: something that ``data`` names is not there; the message says what and what comes nearest.
    """
    readers = {".txt": _read_paragraphs, FOLDER: _read_folder}
    return load_rows(data, "data.text", [] if data.text is None else [data.text], readers=readers)


def in_blocks(documents: Sentences, tokenizer, length: int, split: str) -> Blocks:
    """Tokens of all documents, the end of text behind each, cut into blocks. With a bar: it is all done here.

    Args:
        length: tokens of a block, two at least.
        split: what messages call it.

    Raises:
        UserError: there is no text.
    """
    from tqdm import tqdm

    texts = [text.strip() for (text,) in documents.texts]  # of the hub, lines come with their ends
    end, pieces = [tokenizer.eos_token_id], []
    with tqdm(
        total=sum(map(len, texts)), desc=f"tokens of {split}", unit="char", unit_scale=True, leave=False, disable=None
    ) as bar:
        for some in _portions(texts):
            found = tokenizer(
                some, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
            )
            pieces += [np.array(ids + end, dtype=np.int32) for ids in found.input_ids if ids]
            bar.update(sum(map(len, some)))
    if not pieces:
        raise UserError(f"data.{split}: no text in the split {split}")
    return Blocks(np.concatenate(pieces), length, len(pieces))


def _portions(texts: list[str]) -> Iterator[list[str]]:
    some, characters = [], 0
    for text in texts:
        some.append(text)
        characters += len(text)
        if characters >= CHARACTERS_AT_ONCE:
            yield some
            some, characters = [], 0
    if some:
        yield some


def _read_paragraphs(file: Path) -> Sentences:
    return _rows(re.split(r"\n\s*\n", _lines(file)), file)


def _read_folder(folder: Path) -> Sentences:
    files = sorted(folder.rglob("*.txt"))
    if not files:
        raise UserError(f"{folder}: no .txt files in it")
    return _rows(map(_lines, files), folder)


def _lines(file: Path) -> str:
    return decoded(file).replace("\r\n", "\n")


def _rows(texts: Iterable[str], path: Path) -> Sentences:
    rows = [(text,) for text in map(str.strip, texts) if text]
    if not rows:
        raise UserError(f"{path}: no text in it")
    return Sentences(rows, [""] * len(rows))
