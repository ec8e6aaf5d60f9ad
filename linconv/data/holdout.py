"""Splits drawn from the data where it comes without them."""

from collections.abc import Iterable

from linconv.errors import UserError, unknown

__all__ = ["hold_out"]

SPLITS = ("validation", "test")


def hold_out(groups: Iterable[list], shares: dict[str, float]) -> dict[str, list]:
    """Cuts the shares off each group, from its front: what falls to each split that ``shares`` names.

    Args:
        groups: each in an order drawn beforehand.
        shares: by split; ``data.holdout`` of a recipe.

    Raises:
        UserError: an unknown split, or shares that are none.
    """
    for split, share in shares.items():
        if split not in SPLITS:
            raise unknown("data.holdout", split, SPLITS)
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
