"""Scores of a model's outputs."""

import numpy as np
import torch
import torch.nn.functional as F

__all__ = ["Metrics", "Perplexity"]


class Metrics:
    """Accuracy of classes or, with a ``tokenizer``, word and character error rates of greedy CTC decoding.

    Error rates are over the whole split: all edits divided by all words, or characters, of the transcripts.
    """

    def __init__(self, tokenizer=None):
        self.tokenizer = tokenizer
        # For each clip of the last scoring, in order: [errors, total], in classes or words.
        self.clips: list[list[int]] = []

    @staticmethod
    def answers(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns the argmax over classes; -100 where the Trainer padded."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits.argmax(-1).masked_fill((logits == -100).all(-1), -100)

    def __call__(self, prediction) -> dict[str, float]:
        answers, labels = prediction.predictions, prediction.label_ids
        if self.tokenizer is None:
            self.clips = [[int(wrong), 1] for wrong in answers != labels]
            return {"accuracy": float(np.mean(answers == labels))}
        import jiwer

        blank = self.tokenizer.pad_token_id
        hypotheses = self.tokenizer.batch_decode(np.where(answers < 0, blank, answers))
        references = self.tokenizer.batch_decode(np.where(labels < 0, blank, labels), group_tokens=False)
        pairs = [(r, h) for r, h in zip(references, hypotheses) if r]  # an empty transcript has no words to get wrong
        if not pairs:
            raise ValueError("labels: got only empty transcripts")
        references, hypotheses = map(list, zip(*pairs))
        self.clips = [_word_errors(r, h) for r, h in pairs]
        return {"wer": jiwer.wer(references, hypotheses), "cer": jiwer.cer(references, hypotheses)}


class Perplexity:
    """Nats per predicted token of the whole split, for next-token prediction, and perplexity, their exponential."""

    def __init__(self):
        # For each block of the last scoring, in order: [nats, tokens].
        self.clips: list[list[float]] = []

    @staticmethod
    def answers(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns float32 (batch, 2), nats and tokens of each row. Shapes: (batch, L, vocabulary) and (batch, L)."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        # Row by row: a float32 copy of a whole batch would be the largest tensor of the run.
        nats = [F.cross_entropy(row[:-1].float(), ids[1:], reduction="sum") for row, ids in zip(logits, labels)]
        return torch.stack([torch.stack(nats), (labels[:, 1:] != -100).sum(-1)], -1)

    def __call__(self, prediction) -> dict[str, float]:
        rows = prediction.predictions.astype(np.float64)  # (blocks, 2)
        self.clips = [[nats, int(tokens)] for nats, tokens in rows.tolist()]
        nats, tokens = rows.sum(0)
        with np.errstate(over="ignore"):  # for an untrained model
            return {"perplexity": float(np.exp(nats / tokens)), "nats_per_token": float(nats / tokens)}


def _word_errors(reference: str, hypothesis: str) -> list[int]:
    import jiwer

    found = jiwer.process_words(reference, hypothesis)
    return [
        found.substitutions + found.deletions + found.insertions,
        found.hits + found.substitutions + found.deletions,
    ]
