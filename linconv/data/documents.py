"""Documents for language models, and the blocks of tokens cut from them."""

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

CHARACTERS_AT_ONCE = 1 << 20  # to the tokenizer, whose results need far more memory than the ids


class Blocks(torch.utils.data.Dataset):
    """The concatenated documents of a split in blocks of tokens: ``{"input_ids": int32 (L,)}`` by index.

    Each token is in one block. All blocks but the last have ``length`` tokens.

    Args:
        tokens: int32, (tokens,).
        length: tokens of a block.
        documents: number of documents.
    """

    def __init__(self, tokens: np.ndarray, length: int, documents: int):
        self.length, self.documents, self.tokens = length, documents, len(tokens)
        self.blocks = [tokens[start : start + length] for start in range(0, len(tokens), length)]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> dict:
        return {"input_ids": self.blocks[i]}


def load_documents(data: Data) -> dict[str, Sentences | None]:
    """Loads the documents of the three splits that ``data`` describes: rows of one text, without classes.

    A split is a .txt file with blank lines between documents; a folder with a .txt file for each document; a .tsv or
    .csv table with a document in each row; or a split of a data set on the hub.

    Raises:
        UserError: something that ``data`` names does not exist; the message names it and the nearest match.
    """
    readers = {".txt": _read_paragraphs, FOLDER: _read_folder}
    return load_rows(data, "data.text", [] if data.text is None else [data.text], readers=readers)


def in_blocks(documents: Sentences, tokenizer, length: int, split: str) -> Blocks:
    """Tokenises all documents, appends the end of text to each, and cuts the tokens into blocks, with a progress bar.

    Args:
        length: tokens of a block, at least two.
        split: its name in messages.

    Raises:
        UserError: there is no text.
    """
    from tqdm import tqdm

    texts = [text.strip() for (text,) in documents.texts]  # hub rows may end in line breaks
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
