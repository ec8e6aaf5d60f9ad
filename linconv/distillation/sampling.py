"""The order of training examples when batches group similar lengths."""

from collections.abc import Callable, Iterator, Sequence

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

__all__ = ["LikeLengths"]


class LikeLengths(torch.utils.data.Sampler):
    """Each index once, in a new order each epoch in which neighbours have similar lengths.

    As in transformers' LengthGroupedSampler, examples are drawn at random into groups of up to 50 batches (a quarter of
    the epoch if that is less), and each group is sorted, longest first. But the order depends only on the seed and the
    epoch. Transformers draws it from torch's generator, whose state at the start of an epoch is unknown to a run that
    resumes in the middle.

    Args:
        lengths: of each example, in any unit.
        batch_size: how many consecutive indices make one optimizer step, over all processes.
        seed: of all draws.
        epoch: returns the number of the epoch that begins. It is a function because not every loader passes
            ``set_epoch`` on to a sampler: accelerate's does not when several processes resume.
    """

    def __init__(self, lengths: Sequence[float], batch_size: int, seed: int, epoch: Callable[[], int]):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=draw))
