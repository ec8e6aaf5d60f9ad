"""SpecAugment drawn once a batch and shared: teacher and student must hear the same thing."""

from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

__all__ = ["SharedSpecAugment"]


class SharedSpecAugment:
    """One draw of SpecAugment (arXiv 1904.08779) by the settings of ``student``'s config.

    A model left to itself draws its own mask in training mode and none in evaluation mode, where the teacher is.
    The time mask goes in as ``mask_time_indices`` (``arguments``), the feature mask through a hook (``applied_to``).
    """

    def __init__(self, student: nn.Module, frame_mask: Tensor):
        config = student.config
        self.time = self.features = None
        if not self.is_on(student):
            return
        batch, length = frame_mask.shape
        if config.mask_time_prob > 0:
            self.time = self._draw(frame_mask, "time", config, frame_mask.shape)
        if config.mask_feature_prob > 0:
            self.features = self._draw(frame_mask, "feature", config, (batch, config.hidden_size))

    @staticmethod
    def is_on(student: nn.Module) -> bool:
        """Whether anything is masked at all."""
        config = student.config
        if not (getattr(config, "apply_spec_augment", False) and hasattr(student.base_model, "_mask_hidden_states")):
            return False
        return config.mask_time_prob > 0 or config.mask_feature_prob > 0

    @staticmethod
    def _draw(frame_mask: Tensor, axis: str, config, shape) -> Tensor:
        mask = _compute_mask_indices(
            tuple(shape),
            mask_prob=getattr(config, f"mask_{axis}_prob"),
            mask_length=min(getattr(config, f"mask_{axis}_length"), shape[1]),
            attention_mask=frame_mask.long() if axis == "time" else None,
            min_masks=getattr(config, f"mask_{axis}_min_masks"),
        )
        return torch.as_tensor(mask, dtype=torch.bool, device=frame_mask.device)

    @property
    def arguments(self) -> dict[str, Tensor]:
        return {} if self.time is None else {"mask_time_indices": self.time}

    @contextmanager
    def applied_to(self, model: nn.Module):
        """Within the context ``model`` masks these features, and none of its own drawing."""
        if self.features is None:
            yield
            return
        config, own = model.config, model.config.mask_feature_prob

        def mask_features(encoder, args, kwargs):
            return (args[0].masked_fill(self.features[:, None, :], 0), *args[1:]), kwargs  # (batch, L, d)

        with ExitStack() as stack:
            stack.callback(setattr, config, "mask_feature_prob", own)
            stack.callback(model.base_model.encoder.register_forward_pre_hook(mask_features, with_kwargs=True).remove)
            config.mask_feature_prob = 0.0
            yield
