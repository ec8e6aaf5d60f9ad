"""Scores of a head's answers."""

import numpy as np
import torch

__all__ = ["Metrics"]


class Metrics:
    """Accuracy of classes; or, with a ``tokenizer``, word and character error rates of greedy CTC decoding.

    Error rates are those of the whole split: edits over words, and over characters, of all transcripts.
    """

    def __init__(self, tokenizer=None):
        self.tokenizer = tokenizer
        # Of each clip scored last, in order: [mistakes, of how many], classes or words.
        self.clips: list[list[int]] = []

    @staticmethod
    def answers(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The best class by row; -100 where the Trainer has padded."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits.argmax(-1).masked_fill((logits == -100).all(-1), -100)

    def __call__(self, prediction) -> dict[str, float]:
        answers, labels = prediction.predictions, prediction.label_ids
        if self.tokenizer is None:
            self.clips = [[int(wrong), 1] for wrong in answers != labels]
            return {"accuracy": float(np.mean(answers == labels))}
        import jiwer

        blank = self.tokenizer.pad_token_id
        heard = self.tokenizer.batch_decode(np.where(answers < 0, blank, answers))
        said = self.tokenizer.batch_decode(np.where(labels < 0, blank, labels), group_tokens=False)
        pairs = [(s, h) for s, h in zip(said, heard) if s]  # an empty transcript has no words to get wrong
        if not pairs:
            raise ValueError("labels: got only empty transcripts")
        said, heard = map(list, zip(*pairs))
        self.clips = [_word_errors(s, h) for s, h in pairs]
        return {"wer": jiwer.wer(said, heard), "cer": jiwer.cer(said, heard)}


def _word_errors(said: str, heard: str) -> list[int]:
    import jiwer

    found = jiwer.process_words(said, heard)
    return [
        found.substitutions + found.deletions + found.insertions,
        found.hits + found.substitutions + found.deletions,
    ]
