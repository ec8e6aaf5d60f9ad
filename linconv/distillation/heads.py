"""What a head answers for: one answer a clip, a frame or a token, and the task's loss over those answers."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["Head"]

# By the end of the class name of the head or of a class that it derives from.
_KINDS = {
    "ForCTC": "ctc",
    "ForAudioFrameClassification": "frame",
    "ForSequenceClassification": "clip",
    "ForAudioClassification": "clip",
    "ForXVector": "clip",
    "ForConditionalGeneration": "token",
}


@dataclass(frozen=True)
class Head:
    """``kind`` is "ctc" or "frame" (an answer a frame), "clip", or "token" (an answer a label)."""

    kind: str

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Head":
        for base in type(model).__mro__:
            for end, kind in _KINDS.items():
                if base.__name__.endswith(end):
                    return cls(kind)
        raise ValueError(
            f"model: got a {type(model).__name__}; want a head class, its name ending in {', '.join(_KINDS)}"
        )

    def model_inputs(self, inputs: dict) -> dict:
        """The inputs less the labels where the model would compute a loss from them that is not used."""
        return {k: v for k, v in inputs.items() if k != "labels"} if self.kind in ("ctc", "frame") else dict(inputs)

    def valid_answers(self, labels: Tensor | None, frame_mask: Tensor) -> Tensor:
        """Which rows of the logits count: bool (batch, L), (batch,) or (batch, labels)."""
        if self.kind in ("ctc", "frame"):
            return frame_mask
        if self.kind == "clip":
            return frame_mask.new_ones(frame_mask.shape[0])
        if labels is None:
            raise ValueError("labels: got None; want labels, which say how many answers there are")
        return labels != -100

    def task_loss(self, outputs, labels: Tensor, frame_mask: Tensor, config) -> Tensor:
        """The task's loss summed over the valid answers."""
        if self.kind == "ctc":
            # (L, batch, vocabulary); padded labels are negative
            log_probs = outputs.logits.log_softmax(-1, dtype=torch.float32).transpose(0, 1)
            present = labels >= 0
            with torch.backends.cudnn.flags(enabled=False):
                return F.ctc_loss(
                    log_probs,
                    labels[present],
                    frame_mask.sum(-1),
                    present.sum(-1),
                    blank=config.pad_token_id,
                    reduction="sum",
                    zero_infinity=config.ctc_zero_infinity,
                )
        if self.kind == "frame":
            # (batch, L, classes), one-hot as transformers has it; the stock loss counts padding too.
            logits = outputs.logits.float()[frame_mask]
            return F.cross_entropy(logits, labels.argmax(-1)[frame_mask], reduction="sum")
        return outputs.loss * self.valid_answers(labels, frame_mask).sum()
