"""The positions of x, B and C among the channels of the convolution's result."""

import dataclasses

import torch

from linconv.ops.columns import joined


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of `conv_scan`; splits channels into views of x, B and C, and joins their gradients.

    directions: of the scan. shared: whether two directions share x, and one convolution holds B and C of both.
    """

    directions: int
    shared: bool
    heads: int
    headdim: int
    groups: int
    dstate: int

    @classmethod
    def of(cls, xBC: torch.Tensor, dt: torch.Tensor, ngroups: int, dstate: int) -> "Layout":
        """From arguments whose sizes were checked."""
        directions, heads = 2 if 4 in (xBC.dim(), dt.dim()) else 1, dt.shape[-1]
        shared = directions == 2 and xBC.dim() == 3
        x = xBC.shape[-1] - cls.BC_blocks(shared) * ngroups * dstate
        return cls(directions, shared, heads, x // heads, ngroups, dstate)

    @staticmethod
    def BC_blocks(shared: bool) -> int:
        """How many blocks of ngroups * dstate channels hold B and C: two, or four for two directions of one x."""
        return 4 if shared else 2

    def operands(self, convolved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (…, L, heads, headdim), B and C (…, L, groups, dstate) from (1 or 2, batch, L, channels)."""
        if self.directions == 1 or self.shared:
            convolved = convolved[0]
        rows, state, width = convolved.shape[:-1], (self.groups, self.dstate), self.heads * self.headdim
        x, BC = torch.split_with_sizes(convolved, (width, convolved.shape[-1] - width), dim=-1)
        if self.shared:
            B, C = BC.view(*rows, 2, 2, *state).permute(3, 2, 0, 1, 4, 5).unbind()
        else:
            B, C = BC.view(*rows, 2, *state).unbind(-3)
        return x.view(*rows, self.heads, self.headdim), B, C

    def joined(self, x: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
        """The inverse of `operands`."""
        parts = (x, B[0], C[0], B[1], C[1]) if self.shared else (x, B, C)
        # reshape, since torch has no rule for batched gradients of flatten.
        columns = [part.reshape(*part.shape[:-2], part.shape[-2] * part.shape[-1]) for part in parts]
        gradients = joined(columns)
        return gradients[None] if self.directions == 1 or self.shared else gradients
