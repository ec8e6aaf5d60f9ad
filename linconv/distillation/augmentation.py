"""SpecAugment drawn once per batch and shared, so that teacher and student get the same input."""

from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

__all__ = ["SharedSpecAugment"]

# The methods by which stock models mask hidden states or the signal.
_OF_STATES, _OF_SIGNAL = "_mask_hidden_states", "_mask_input_features"


class SharedSpecAugment:
    """One draw of SpecAugment (arXiv 1904.08779) with the settings of ``student``'s config.

    By itself a model draws its own mask in training mode, and none in evaluation mode, the teacher's.
    Wav2Vec2 and related models mask the encoder's input: the time mask is passed as ``mask_time_indices``
    (``arguments``), the feature mask is applied by a hook (``applied_to``). Whisper masks the signal, and would write
    the mask into the batch itself: the hook applies both masks.

    Args:
        student: the model whose config has the settings.
        frame_mask: bool (batch, L), the valid frames of the hidden states.
        signal_mask: (batch, frames), the valid frames of the signal; None: all of them.
        frames: number of frames of the signal, padding included.
    """

    def __init__(self, student: nn.Module, frame_mask: Tensor, *, signal_mask: Tensor | None, frames: int):
        config = student.config
        self.time = self.features = None
        if not self.is_on(student):
            return
        self.of_signal = hasattr(student.base_model, _OF_SIGNAL)
        if self.of_signal:
            whole = frame_mask.new_ones(len(frame_mask), frames)
            frame_mask, width = whole if signal_mask is None else signal_mask.bool(), config.num_mel_bins
        else:
            width = config.hidden_size
        if config.mask_time_prob > 0:
            self.time = self._draw(frame_mask, "time", config, frame_mask.shape)
        if config.mask_feature_prob > 0:
            self.features = self._draw(frame_mask, "feature", config, (len(frame_mask), width))

    @staticmethod
    def is_on(student: nn.Module) -> bool:
        """Whether anything is masked."""
        config, masked = student.config, any(hasattr(student.base_model, name) for name in (_OF_STATES, _OF_SIGNAL))
        if not (getattr(config, "apply_spec_augment", False) and masked):
            return False
        return config.mask_time_prob > 0 or config.mask_feature_prob > 0

    @staticmethod
    def _draw(frame_mask: Tensor, axis: str, config, shape) -> Tensor:
        mask = _compute_mask_indices(
            tuple(shape),
            mask_prob=getattr(config, f"mask_{axis}_prob"),
            mask_length=min(getattr(config, f"mask_{axis}_length"), shape[1]),
            attention_mask=frame_mask.long() if axis == "time" else None,
            min_masks=getattr(config, f"mask_{axis}_min_masks", 0),  # WavLM's config has none for features
        )
        return torch.as_tensor(mask, dtype=torch.bool, device=frame_mask.device)

    @property
    def arguments(self) -> dict[str, Tensor]:
        return {} if self.time is None or self.of_signal else {"mask_time_indices": self.time}

    @contextmanager
    def applied_to(self, model: nn.Module):
        """Within the context ``model`` masks these frames and features, and draws no mask of its own."""
        masks = []  # broadcast over the encoder's input: (batch, L, d), or (batch, features, frames)
        if self.features is not None:
            masks.append(self.features[:, :, None] if self.of_signal else self.features[:, None, :])
        if self.time is not None and self.of_signal:
            masks.append(self.time[:, None, :])
        if not masks:
            yield
            return
        config, names = model.config, ("mask_time_prob", "mask_feature_prob")
        drawn = names if self.of_signal else names[1:]

        def mask(encoder, args, kwargs):
            x = args[0]
            for places in masks:
                x = x.masked_fill(places, 0)
            return (x, *args[1:]), kwargs

        with ExitStack() as stack:
            for name in drawn:
                stack.callback(setattr, config, name, getattr(config, name))
                setattr(config, name, 0.0)
            stack.callback(model.base_model.encoder.register_forward_pre_hook(mask, with_kwargs=True).remove)
            yield
