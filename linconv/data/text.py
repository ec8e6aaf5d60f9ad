"""Transcripts as CTC targets: characters."""

import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

__all__ = ["build_tokenizer", "normalize"]


def normalize(text: str) -> str:
    """Lower case; letters, marks, digits and apostrophes kept, all else a space; single spaces."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    kept = (c if unicodedata.category(c)[0] in "LMN" or c == "'" else " " for c in text)
    return " ".join("".join(kept).split())


def build_tokenizer(texts: Iterable[str]):
    """A Wav2Vec2CTCTokenizer over the characters of ``texts``: [PAD] (the CTC blank) 0, [UNK] 1, | (a space) 2."""
    from transformers import Wav2Vec2CTCTokenizer

    characters = sorted(set().union(*texts) - {" ", "|"})
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "|", *characters])}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        # No sentence markers: CTC has no use for them, and they would widen the head.
        return Wav2Vec2CTCTokenizer(
            str(path), pad_token="[PAD]", unk_token="[UNK]", bos_token=None, eos_token=None, word_delimiter_token="|"
        )
