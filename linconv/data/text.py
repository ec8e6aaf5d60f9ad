"""Tokenizers built from the data, of characters for CTC and of byte-level BPE for language models; normalisation of
transcripts."""

import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from linconv.errors import UserError

__all__ = ["build_bpe_tokenizer", "build_tokenizer", "normalize"]

END_OF_TEXT = "<|endoftext|>"


def normalize(text: str) -> str:
    """Applies NFKC and case folding; all but letters, marks, numbers and apostrophes become single spaces."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    kept = (c if unicodedata.category(c)[0] in "LMN" or c == "'" else " " for c in text)
    return " ".join("".join(kept).split())


def build_tokenizer(texts: Iterable[str]):
    """Builds a Wav2Vec2CTCTokenizer of the characters in ``texts``: [PAD] (CTC blank) 0, [UNK] 1, | (space) 2."""
    from transformers import Wav2Vec2CTCTokenizer

    characters = sorted(set().union(*texts) - {" ", "|"})
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "|", *characters])}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        # No sentence markers: CTC does not need them, and they would widen the head.
        return Wav2Vec2CTCTokenizer(
            str(path), pad_token="[PAD]", unk_token="[UNK]", bos_token=None, eos_token=None, word_delimiter_token="|"
        )


def build_bpe_tokenizer(texts: Iterable[str], size: int):
    """Trains a byte-level BPE tokenizer of ``size`` tokens, or fewer if ``texts`` have too few merges.

    <|endoftext|> is 0, and also pads. Every byte has a token, so any text can be tokenised.

    Raises:
        UserError: ``size`` is too small for the bytes and the end of text.
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
