"""Masks of the valid frames of a padded batch."""

import torch

__all__ = ["frame_mask"]


def frame_mask(seq_lens: torch.Tensor, length: int) -> torch.Tensor:
    """bool (batch, length), True at the valid frames of each sequence. seq_lens: (batch,) int."""
    return torch.arange(length, device=seq_lens.device) < seq_lens[:, None]
