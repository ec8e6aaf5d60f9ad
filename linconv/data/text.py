"""Tokenizers built from the data: characters for CTC, byte-level BPE for language models; and how transcripts are
normalised."""

import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from linconv.errors import UserError

__all__ = ["build_bpe_tokenizer", "build_tokenizer", "normalize"]

END_OF_TEXT = "<|endoftext|>"


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


def build_bpe_tokenizer(texts: Iterable[str], size: int):
    """A byte-level BPE tokenizer of ``size`` tokens, or of as many as ``texts`` have merges for.

    <|endoftext|> is 0, and pads too. The bytes are among the others: there is no text without tokens.

    Raises:
        UserError: ``size`` has no room for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if not isinstance(size, int) or size <= len(alphabet):
        raise UserError(
            f"model.config.vocab_size: got {size!r}; want {len(alphabet) + 1} or more: the bytes and the end of text"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {name: END_OF_TEXT for name in ("bos_token", "eos_token", "pad_token")}
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
