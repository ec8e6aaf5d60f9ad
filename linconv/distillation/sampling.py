"""The order in which examples are drawn where batches are to be of like lengths."""

from collections.abc import Callable, Iterator, Sequence

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

__all__ = ["LikeLengths"]


class LikeLengths(torch.utils.data.Sampler):
    """Each index once, drawn anew each epoch, so that those side by side are of like lengths.

    As transformers' LengthGroupedSampler: examples are drawn at random into groups of up to 50 batches (a quarter of
    the epoch where it has fewer), and each group is sorted, the longest first. But a draw follows from the seed and the
    epoch alone. Theirs is from torch's generator, whose state at the start of an epoch is unknown to a run that is
    resumed in its middle.

    Args:
        lengths: of each example, in any unit.
        batch_size: how many indices side by side are one optimizer step, of all processes.
        seed: of all draws.
        epoch: gives the number of the epoch that begins. It is asked, for not every loader hands ``set_epoch`` on to a
            sampler: accelerate's does not where several processes resume.
    """

    def __init__(self, lengths: Sequence[float], batch_size: int, seed: int, epoch: Callable[[], int]):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=draw))
