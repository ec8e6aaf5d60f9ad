"""The splits of data, and held-out ones for data without them."""

from collections.abc import Iterable

from linconv.errors import UserError, unknown

__all__ = ["SPLITS", "hold_out"]

SPLITS = ("train", "validation", "test")
HELD_OUT = SPLITS[1:]


def hold_out(groups: Iterable[list], shares: dict[str, float]) -> dict[str, list]:
    """Cuts the shares off the front of each group and returns the items of each split in ``shares``.

    Args:
        groups: each already in random order.
        shares: by split; ``data.holdout`` of a recipe.

    Raises:
        UserError: an unknown split, a share not between 0 and 1, or shares that leave nothing to train on.
    """
    for split, share in shares.items():
        if split not in HELD_OUT:
            raise unknown("data.holdout", split, HELD_OUT)
        if not 0 < share < 1:
            raise UserError(f"data.holdout.{split}: got {share}; want a share between 0 and 1")
    if sum(shares.values()) >= 1:
        raise UserError("data.holdout: the shares leave nothing to train on")
    taken: dict[str, list] = {split: [] for split in shares}
    for group in groups:
        start = 0
        for split, share in shares.items():
            end = start + round(share * len(group))
            taken[split] += group[start:end]
            start = end
    return taken
