"""Clips, sentences, or blocks of tokens, to a batch."""

from collections.abc import Callable

import numpy as np
import torch

from linconv.data.documents import Blocks
from linconv.data.sentences import Sentences

__all__ = ["BlockCollator", "Collator", "SentenceCollator"]

ROWS_AT_ONCE = 1000  # to the tokenizer, where only their lengths are kept


class Collator:
    """Makes a padded batch of clips: features, attention mask, labels.

    Features are extracted clip by clip, then padded: what a clip is beside in a batch cannot change them (a spectrum
    at the end of a clip reaches over its end).

    Args:
        feature_extractor: that of the model. Audio is taken to be at its sampling rate.
        encode: a target to its label (int) or to its label ids (list of int; padded with -100).
        attention_mask: whether the batch has one; None asks the feature extractor.
    """

    def __init__(self, feature_extractor, encode: Callable[[str], int | list[int]], attention_mask: bool | None = None):
        self.feature_extractor, self.encode = feature_extractor, encode
        self.input_name = feature_extractor.model_input_names[0]
        self.attention_mask = feature_extractor.return_attention_mask if attention_mask is None else attention_mask

    def __call__(self, clips: list[dict]) -> dict[str, torch.Tensor]:
        features = [self._features(clip["audio"]) for clip in clips]  # (..., T) each
        lengths = torch.tensor([f.shape[-1] for f in features])
        longest = int(lengths.max())
        padding = self.feature_extractor.padding_value
        batch = {
            self.input_name: torch.stack(
                [torch.nn.functional.pad(f, (0, longest - f.shape[-1]), value=padding) for f in features]
            )
        }
        if self.attention_mask:
            batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        labels = [self.encode(clip["target"]) for clip in clips]
        if isinstance(labels[0], list):
            labels = [torch.tensor(ids, dtype=torch.long) for ids in labels]
            batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        else:
            batch["labels"] = torch.tensor(labels)
        return batch

    def _features(self, audio: np.ndarray) -> torch.Tensor:
        extracted = self.feature_extractor(
            audio,
            sampling_rate=self.feature_extractor.sampling_rate,
            padding=False,
            truncation=False,
            return_tensors="np",
        )
        return torch.from_numpy(np.asarray(extracted[self.input_name][0], dtype=np.float32))


class SentenceCollator:
    """Makes a padded batch of sentences or pairs: token ids, attention mask, labels.

    Args:
        tokenizer: that of the model.
        encode: a target to its label.
        max_length: tokens that a row is cut to; None for as many as the tokenizer says its model takes.
    """

    def __init__(self, tokenizer, encode: Callable[[str], int], max_length: int | None = None):
        self.tokenizer, self.encode, self.max_length = tokenizer, encode, max_length

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = self._tokens([row["text"] for row in rows], padding=True, padding_side="right", return_tensors="pt")
        return {**batch, "labels": torch.tensor([self.encode(row["target"]) for row in rows])}

    def lengths(self, rows: Sentences) -> list[int]:
        """Tokens of each row, as it is cut. With a bar: all are tokenised."""
        from tqdm import tqdm

        found = []
        with tqdm(total=len(rows), desc="lengths", unit="row", unit_scale=True, leave=False, disable=None) as bar:
            for start in range(0, len(rows), ROWS_AT_ONCE):
                some = rows.texts[start : start + ROWS_AT_ONCE]
                found += map(len, self._tokens(some).input_ids)
                bar.update(len(some))
        return found

    def _tokens(self, texts: list[tuple[str, ...]], **options):
        columns = map(list, zip(*texts))
        return self.tokenizer(*columns, truncation=True, max_length=self.max_length, **options)


class BlockCollator:
    """Makes a padded batch of blocks: token ids, attention mask, and as labels the same ids, -100 at the padding.

    Args:
        padding: the token that pads. It may be one that the text has, too, such as its end: there it is learned.
    """

    def __init__(self, padding: int):
        self.padding = padding

    def __call__(self, blocks: list[dict]) -> dict[str, torch.Tensor]:
        ids = [torch.from_numpy(block["input_ids"]).long() for block in blocks]
        input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.padding)  # (batch, L)
        valid = torch.arange(input_ids.shape[1]) < torch.tensor([len(block) for block in ids])[:, None]
        return {
            "input_ids": input_ids,
            "attention_mask": valid.long(),
            "labels": input_ids.masked_fill(~valid, -100),
        }

    def lengths(self, blocks: Blocks) -> list[int]:
        """Tokens of each block."""
        return list(map(len, blocks.blocks))
