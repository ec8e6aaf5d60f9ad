"""Preprocessing: clips, sentences or documents to batches, and outputs to scores."""

import warnings
from bisect import bisect_left
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoFeatureExtractor, PreTrainedModel
from transformers.utils import FEATURE_EXTRACTOR_NAME

from linconv.data import BlockCollator, Collator, SentenceCollator, Splits, in_blocks
from linconv.data.holdout import SPLITS
from linconv.data.metrics import Metrics, Perplexity
from linconv.distillation import DistillationArguments
from linconv.errors import UserError, unknown
from linconv.pipeline.checkpoints import OF_TEXT, check_vocabulary, family_of, positions
from linconv.pipeline.processes import by_main_process
from linconv.recipe import Recipe

BLOCK = 1024  # tokens, unless the recipe or the model's positions set another length


@dataclass
class Preprocessing:
    """Turns clips, sentences or blocks into batches, and outputs into scores."""

    collator: Collator | SentenceCollator | BlockCollator
    metrics: Metrics | Perplexity
    saved: Any  # what is saved in the checkpoint folder


def make_preprocessing(recipe: Recipe, splits: Splits, config, extractor, tokenizer) -> Preprocessing:
    if recipe.task == "language_modeling":
        return Preprocessing(BlockCollator(tokenizer.pad_token_id), Perplexity(), tokenizer)
    known = [splits[name].targets for name in SPLITS if splits[name] is not None and splits[name].targets is not None]
    if recipe.task != "ctc":
        label2id = dict(config.label2id)

        def encode(target: str) -> int:
            if target not in label2id:
                raise unknown("data: label", target, label2id)
            return label2id[target]

        for target in dict.fromkeys(chain.from_iterable(known)):  # fail now, not in the middle of a run
            encode(target)

        if recipe.task == "text_classification":
            length = min(n for n in (recipe.data.max_length, positions(config), 1 << 20) if n)
            return Preprocessing(SentenceCollator(tokenizer, encode, length), Metrics(), tokenizer)
        return Preprocessing(Collator(extractor, encode), Metrics(), extractor)
    check_vocabulary(config, tokenizer, recipe.task)
    processor = transformers.Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer)
    spell = _spelling(tokenizer, recipe.data)
    for name in SPLITS:
        if splits[name] is not None and splits[name].targets and not any(splits[name].targets):
            raise UserError(f"data.text: every transcript of the split {name} is empty")
    _check_transcripts(chain.from_iterable(known), spell, tokenizer)
    return Preprocessing(Collator(extractor, spell), Metrics(tokenizer), processor)


def feature_extractor_of(path: str | None, config, recipe: Recipe):
    if recipe.task in OF_TEXT:
        return None
    sampling_rate, extractor = recipe.data.sampling_rate, None
    if path is not None:
        try:
            extractor = AutoFeatureExtractor.from_pretrained(path)
        except (OSError, ValueError) as error:
            if (Path(path) / FEATURE_EXTRACTOR_NAME).is_file():  # broken, not absent
                raise UserError(f"{path}: {FEATURE_EXTRACTOR_NAME}: {' '.join(str(error).split())[:300]}") from error
    if extractor is not None and extractor.sampling_rate != sampling_rate:
        raise UserError(f"data.sampling_rate: got {sampling_rate}; the model wants {extractor.sampling_rate}")
    # The mask keeps padding out of every sum; only group-normalised Wav2Vec2 checkpoints have none.
    if "whisper" in config.model_type:
        if extractor is None:
            extractor = transformers.WhisperFeatureExtractor(config.num_mel_bins, sampling_rate=sampling_rate)
        # Published extractors return no mask: for the stock model a clip continues with silence; here it ends.
        extractor.return_attention_mask = True
    elif extractor is None:
        extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=sampling_rate, return_attention_mask=True)
    return extractor


def _spelling(tokenizer, data):
    """Returns the function from a transcript to its tokens; it upper-cases if the vocabulary has only capitals."""
    letters = [token for token in tokenizer.get_vocab() if len(token) == 1 and token.lower() != token.upper()]
    capitals = data.normalize_text and letters and all(token.isupper() for token in letters)
    return lambda text: tokenizer(text.upper() if capitals else text).input_ids


def _check_transcripts(texts, spell, tokenizer) -> None:
    """Warns of characters without a token; raises UserError if no character has one."""
    characters = set().union(*texts) - {" "}
    unknown_ones = sorted(c for c in characters if tokenizer.unk_token_id in spell(c))
    if not unknown_ones:
        return
    shown = " ".join(unknown_ones[:20]) + (" ..." if len(unknown_ones) > 20 else "")
    if len(unknown_ones) == len(characters):
        raise UserError(f"data.text: the tokenizer has no token for any character of the transcripts: {shown}")
    warnings.warn(
        f"data.text: the tokenizer has no token for {shown}, which become {tokenizer.unk_token}: take them out of the "
        "transcripts, or fine-tune from a checkpoint whose tokenizer has them",
        stacklevel=2,
    )


def shortest_clip(model: PreTrainedModel, extractor) -> float:
    """Returns the shortest duration, in seconds, for which a model has a frame."""
    family, rate = family_of(model.config.model_type, "model type"), extractor.sampling_rate
    # Whisper's spectra are one hop apart and extend half a window to either side.
    hop, window = getattr(extractor, "hop_length", 1), getattr(extractor, "n_fft", 0)
    first = bisect_left(range(rate), 1, key=lambda n: int(family.frame_lengths(model, torch.tensor(n // hop))))
    return max(first, window // 2 + 1) / rate


def cut_into_blocks(recipe: Recipe, splits: Splits, config, tokenizer, args: DistillationArguments) -> Splits:
    """Cuts the documents of a language model into blocks of tokens. Splits of other tasks are returned as they are."""
    if recipe.task != "language_modeling":
        return splits
    most = positions(config)
    length = min(BLOCK, most or BLOCK) if recipe.data.max_length is None else recipe.data.max_length
    if length < 2 or (most and length > most):
        upper = f"to {most:,}, which the model has positions for" if most else "tokens or more"
        raise UserError(f"data.max_length: got {length}; want 2 {upper}")
    if tokenizer.eos_token is None:
        raise UserError("model: its tokenizer has no end of text, which stands between documents; want one that has")
    check_vocabulary(config, tokenizer, recipe.task)
    there = [name for name in SPLITS if splits[name] is not None]
    blocks = by_main_process(args, lambda: {name: in_blocks(splits[name], tokenizer, length, name) for name in there})
    return replace(splits, **blocks)
