"""What a head predicts for (a clip, frame, token, span or choice), and the task's loss over these answers."""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["Head"]

IGNORED = -100  # the label of positions without an answer, as in transformers


class Head:
    """What the trainer needs to know about a head: its answers, which of them count, and their labels.

    An answer is one distribution over classes. A sequence is one row in the transformer blocks: a clip, a sentence, or
    one of several choices. ``inputs`` is a batch from the collator; ``frame_mask``, bool (sequences, L), is True at the
    frames or tokens of the hidden states that are not padding.
    """

    label_names = ("labels",)  # inputs that only the task's loss needs
    of_frames = False  # whether the logits have a row for each frame

    def __init__(self, options: dict):
        self.options = options  # arguments of every forward pass

    @staticmethod
    def of(model: PreTrainedModel) -> "Head":
        for base in type(model).__mro__:
            for end, kind in _KINDS.items():
                if base.__name__.endswith(end):
                    # By default decoders would cache keys and values for tokens that never come.
                    caches = "use_cache" in inspect.signature(model.forward).parameters
                    return kind({"use_cache": False} if caches else {})
        raise ValueError(
            f"model: got a {type(model).__name__}; want a head class, its name ending in {', '.join(_KINDS)}"
        )

    def labels(self, inputs: dict) -> Tensor | None:
        """The labels in the form that ``task_loss`` takes; None if the batch has none."""
        return inputs.get("labels")

    def model_inputs(self, inputs: dict) -> dict:
        """The model's inputs; without labels if the loss that the model would compute from them is not used."""
        return {k: v for k, v in inputs.items() if k not in self.label_names} | self.options

    def sequences(self, inputs: dict) -> dict[str, Tensor]:
        """The tensors that the hidden states depend on, one row per sequence."""
        return {k: x for k, x in inputs.items() if isinstance(x, Tensor) and k not in self.label_names}

    def logits(self, outputs) -> Tensor:
        """The model's answers: (sequences, n), or (sequences, L, n) if ``of_frames``."""
        return outputs.logits

    def distributions(self, logits: Tensor, inputs: dict, frame_mask: Tensor) -> Tensor:
        """The logits with one row for each entry of ``valid_answers``, classes in the last axis."""
        return logits

    def valid_answers(self, inputs: dict, frame_mask: Tensor) -> Tensor:
        """Which answers count: bool, one entry per answer."""
        raise NotImplementedError

    def task_loss(self, outputs, inputs: dict, frame_mask: Tensor, config) -> Tensor:
        """The task's loss, summed over the valid answers."""
        answers = self.valid_answers(inputs, frame_mask)
        rows = self.distributions(self.logits(outputs), inputs, frame_mask)[answers]
        return F.cross_entropy(rows.float(), self.labels(inputs)[answers], reduction="sum")

    def predictions(self, logits, frame_mask: Tensor, config):
        """The model's outputs as passed to an evaluation."""
        return logits


class _OwnLoss(Head):
    """The model computes the loss itself, as a mean over the valid answers."""

    def model_inputs(self, inputs):
        return dict(inputs) | self.options

    def task_loss(self, outputs, inputs, frame_mask, config):
        answers = self.valid_answers(inputs, frame_mask)
        # The mean over no answers is NaN.
        return outputs.loss * answers.sum() if answers.any() else outputs.logits.sum() * 0


class _Clips(_OwnLoss):
    """One answer per clip or sentence. The config decides the loss: one class, several classes or numbers."""

    def valid_answers(self, inputs, frame_mask):
        labels = self.labels(inputs)
        if labels is None or labels.is_floating_point():
            return frame_mask.new_ones(len(frame_mask))
        return labels.flatten() != IGNORED


class _Speakers(_Clips):
    """One answer per clip. The stock loss, which has weights of its own, cannot ignore one."""

    def valid_answers(self, inputs, frame_mask):
        answers = super().valid_answers(inputs, frame_mask)
        if not answers.all():
            raise ValueError(f"labels: got {IGNORED}; want an id from 0 up for each clip, for the head is ForXVector")
        return answers


class _DecoderTokens(_OwnLoss):
    """One answer per label; the decoder also reads the labels."""

    label_names = ()

    def valid_answers(self, inputs, frame_mask):
        labels = self.labels(inputs)
        if labels is None:
            raise ValueError("labels: got None; want labels, which say how many answers there are")
        return labels != IGNORED  # (batch, labels)


class _Frames(Head):
    """One answer per frame, without padding. The stock loss counts padding too."""

    of_frames = True

    def labels(self, inputs):
        labels = inputs.get("labels")
        return None if labels is None else labels.argmax(-1)  # (batch, L), from one-hot (batch, L, classes)

    def valid_answers(self, inputs, frame_mask):
        return frame_mask


class _CTC(Head):
    """One answer per frame; the labels, padded with negative numbers, have their own length."""

    of_frames = True

    def valid_answers(self, inputs, frame_mask):
        return frame_mask

    def task_loss(self, outputs, inputs, frame_mask, config):
        labels, vocabulary = self.labels(inputs), outputs.logits.shape[-1]
        # ctc_loss does not check this, and reads out of bounds.
        if labels.numel() and (largest := int(labels.max())) >= vocabulary:
            raise ValueError(f"labels: got {largest}; want ids below {vocabulary}, the size of the vocabulary")
        # (L, batch, vocabulary)
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

    def predictions(self, logits, frame_mask, config):
        # Outputs at padding are not part of the answer: they become blank, which decoding drops.
        frames, *more = logits if isinstance(logits, tuple) else (logits,)
        frames[~frame_mask] = torch.finfo(frames.dtype).min
        frames[..., config.pad_token_id].masked_fill_(~frame_mask, 0)
        return (frames, *more) if more else frames


class _Tokens(Head):
    """One answer per token with a label, or per token if there are no labels."""

    of_frames = True

    def valid_answers(self, inputs, frame_mask):
        labels = self.labels(inputs)
        if labels is None:
            return frame_mask
        if labels.shape != frame_mask.shape:
            got, want = tuple(labels.shape), tuple(frame_mask.shape)
            raise ValueError(f"labels: got shape {got}; want {want}, one a token")
        return frame_mask & (labels != IGNORED)


class _NextTokens(_Tokens):
    """One answer per token: the next token."""

    def labels(self, inputs):
        labels = inputs.get("labels")
        return None if labels is None else F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # (batch, L)


class _Span(Head):
    """Two answers per sequence, the start and the end of a span: the classes are its tokens, without padding."""

    label_names = ("start_positions", "end_positions")
    of_frames = True

    def labels(self, inputs):
        given = {name: inputs.get(name) for name in self.label_names}
        missing = [name for name, positions in given.items() if positions is None]
        if len(missing) == 1:
            raise ValueError(f"{missing[0]}: got None; want start_positions and end_positions, or neither")
        # (batch, 2); transformers also clamps negative positions to 0
        return None if missing else torch.stack([x.flatten() for x in given.values()], 1).clamp(min=0)

    def logits(self, outputs):
        return torch.stack([outputs.start_logits, outputs.end_logits], -1)  # (batch, L, 2)

    def distributions(self, logits, inputs, frame_mask):
        return logits.transpose(1, 2).masked_fill(~frame_mask[:, None], -math.inf)  # (batch, 2, L)

    def valid_answers(self, inputs, frame_mask):
        # A position after the last token belongs to a span that was cut off. The stock loss ignores it only if it is
        # also after the padding, which depends on the other sentences of the batch.
        labels, last = self.labels(inputs), frame_mask.shape[1] - 1
        if labels is None:
            return frame_mask.any(-1, keepdim=True).expand(-1, 2)
        return frame_mask.gather(1, labels.clamp(max=last)) & (labels <= last)  # (batch, 2)

    def predictions(self, logits, frame_mask, config):
        start, end, *more = logits
        lowest = torch.finfo(start.dtype).min  # finite: metrics may add the two
        return (start.masked_fill(~frame_mask, lowest), end.masked_fill(~frame_mask, lowest), *more)


class _Choices(Head):
    """One answer per question, over its choices: inputs are (batch, choices, L), and each choice is a sequence."""

    def sequences(self, inputs):
        return {k: x.flatten(0, 1) for k, x in super().sequences(inputs).items()}

    def logits(self, outputs):
        return outputs.logits.flatten()[:, None]  # (sequences, 1)

    def distributions(self, logits, inputs, frame_mask):
        return logits.view(inputs["input_ids"].shape[:2])  # (batch, choices)

    def valid_answers(self, inputs, frame_mask):
        labels = self.labels(inputs)  # (batch,)
        return frame_mask.new_ones(len(inputs["input_ids"])) if labels is None else labels != IGNORED


# By the suffix of the class name of the head or of one of its bases. Heads for pretraining are not here: they have two
# tasks with separate answers, or draw at random what a frame is compared with.
_KINDS: dict[str, type[Head]] = {
    "ForCTC": _CTC,
    "ForAudioFrameClassification": _Frames,
    "ForSequenceClassification": _Clips,
    "ForAudioClassification": _Clips,
    "ForXVector": _Speakers,
    "ForNextSentencePrediction": _Clips,
    "ForConditionalGeneration": _DecoderTokens,
    "ForTokenClassification": _Tokens,
    "ForMaskedLM": _Tokens,
    "ForCausalLM": _NextTokens,
    "ForQuestionAnswering": _Span,
    "ForMultipleChoice": _Choices,
}
