"""Batches of clips, sentences or blocks of tokens."""

from collections.abc import Callable

import numpy as np
import torch

from linconv.data.documents import Blocks
from linconv.data.sentences import Sentences

__all__ = ["BlockCollator", "Collator", "SentenceCollator"]

ROWS_AT_ONCE = 1000  # to the tokenizer, when only lengths are needed


class Collator:
    """Makes a padded batch of clips: features, attention mask, labels.

    Features are extracted from each clip alone and then padded, so the rest of the batch cannot change them (the last
    spectra of a clip extend beyond its end).

    Args:
        feature_extractor: that of the model. Audio must have its sampling rate.
        encode: maps a target to its label (int) or its label ids (list of int; padded with -100).
        attention_mask: whether batches have one; None takes the feature extractor's setting.
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
        encode: maps a target to its label.
        max_length: truncates rows to this many tokens; None uses the tokenizer's limit for its model.
    """

    def __init__(self, tokenizer, encode: Callable[[str], int], max_length: int | None = None):
        self.tokenizer, self.encode, self.max_length = tokenizer, encode, max_length

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = self._tokens([row["text"] for row in rows], padding=True, padding_side="right", return_tensors="pt")
        return {**batch, "labels": torch.tensor([self.encode(row["target"]) for row in rows])}

    def lengths(self, rows: Sentences) -> list[int]:
        """Returns the tokens of each row after truncation. Tokenises all rows, with a progress bar."""
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
    """Makes a padded batch of blocks: token ids, attention mask, and the same ids as labels, -100 at the padding.

    Args:
        padding: the padding token. The text may contain it too, as the end of text; there it is learned.
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
        """Returns the number of tokens of each block."""
        return list(map(len, blocks.blocks))
