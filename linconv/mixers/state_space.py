"""Shared parts of the mixers with a state: sizes, parameters, initialisation, and modules that hold weights."""

import math

import torch
from torch import nn

from linconv import ops
from linconv.mixers.protocol import MAX_WIDTH, Mixer, Weights, check_integer, check_number
from linconv.ops.short_conv import WIDTHS
from linconv.ops.ssd.arguments import MAX_SIZE


class DepthwiseConv(Weights, nn.Module):
    """Holds the weights of a short convolution; the mixer computes it through `linconv.ops`.

    weight (*shape, width), bias (*shape), where shape is (channels,), or (2, channels) for both directions.
    """

    def __init__(self, *shape: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape, width))
        self.bias = nn.Parameter(torch.empty(*shape))
        self.reset_parameters()

    def reset_parameters(self):
        bound = self.weight.shape[-1] ** -0.5  # as torch.nn.Conv1d with one channel per group
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)


class GatedRMSNorm(Weights, nn.Module):
    """Holds the weight (*shape) of a gated RMS norm; the mixer computes it through `linconv.ops`."""

    bias = None

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*shape))

    def reset_parameters(self):
        nn.init.ones_(self.weight)


class StateSpaceMixer(Mixer):
    """Shared parts of Mamba and the Mamba-2 type mixers: widths, and the rates A, stored as A_log.

    Raises:
        TypeError, ValueError: an option has a wrong type or value; the message names it.
    """

    # Decay would pull the rates to -1 and the steps to softplus(0): long and short memories would become alike.
    no_weight_decay = ("A_log", "D", "dt_bias")

    def __init__(self, d_model, d_state, d_conv, expand):
        super().__init__(d_model)
        check_integer("d_state", d_state, high=MAX_SIZE)
        check_integer("d_conv", d_conv, WIDTHS.start, WIDTHS.stop - 1)
        check_number("expand", expand)
        if not expand > 0:
            raise ValueError(f"expand is {expand}, wanted a number above 0")
        if not expand * d_model <= MAX_WIDTH:
            raise ValueError(
                f"expand is {expand}, wanted at most {MAX_WIDTH} for expand * d_model, d_model being {d_model}"
            )
        self.d_state, self.d_conv = d_state, d_conv
        self.d_inner = round(expand * d_model)

    @property
    def A(self) -> torch.Tensor:
        """The rates of the state, shaped as A_log, at least fp32."""
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def reset_parameters(self):
        for child in self.children():
            child.reset_parameters()


class SSDMixer(StateSpaceMixer):
    """What the mixers on the state space dual scan share (Mamba-2), of one direction or two: heads with the parameters
    A_log, D and dt_bias.

    Args:
        chunk_size: an int or None; not used.
        directions: 2 if these parameters are stacked (forward, backward), else 1.

    Raises:
        TypeError, ValueError: an option has a wrong type or value, or does not fit the others; the message names it.
    """

    def __init__(self, d_model, d_state, d_conv, expand, headdim, ngroups, chunk_size, *, directions):
        super().__init__(d_model, d_state, d_conv, expand)
        check_integer("headdim", headdim, high=MAX_SIZE)
        check_integer("ngroups", ngroups)
        if chunk_size is not None:
            check_integer("chunk_size", chunk_size)
        self.headdim, self.ngroups = headdim, ngroups
        if self.d_inner % headdim or not self.d_inner:
            raise ValueError(f"headdim is {headdim}, wanted a divisor of expand * d_model = {self.d_inner}")
        self.nheads = self.d_inner // headdim
        if self.nheads % ngroups:
            raise ValueError(f"ngroups is {ngroups}, wanted a divisor of the {self.nheads} heads")
        shape = (2, self.nheads) if directions == 2 else (self.nheads,)
        self.A_log, self.D, self.dt_bias = (nn.Parameter(torch.empty(shape)) for _ in range(3))

    @torch.no_grad()
    def reset_parameters(self):
        """As mamba_ssm's Mamba2: -A uniform in 1 to 16, steps log-uniform in 0.001 to 0.1, D is 1."""
        super().reset_parameters()
        self.A_log.copy_(torch.empty_like(self.A_log).uniform_(1, 16).log_())
        self.D.fill_(1)
        draw_steps(self.dt_bias)

    def conv_scan_norm(self, z, xBC, dt, seq_lens, **options):
        """The steps between the projections: z ([2,] b, L, d_inner), xBC and dt to ([2,] b, L, d_inner).

        options: for `linconv.ops.conv_scan`, which documents xBC and dt.
        """
        y = ops.conv_scan(
            xBC, dt, *self.conv1d(), self.A, self.D, self.dt_bias, dstate=self.d_state, ngroups=self.ngroups,
            seq_lens=seq_lens, **options,
        )  # fmt: skip
        return self.gated_norm(y, z, seq_lens)

    def gated_norm(self, y, z, seq_lens):
        """y ([2,] b, L, heads, headdim) after the gate z and the norm, ([2,] b, L, d_inner)."""
        group_size = self.d_inner // self.ngroups
        return ops.gated_rms_norm(y.flatten(-2), z, self.norm()[0], group_size=group_size, seq_lens=seq_lens)

    def extra_repr(self):
        return f"heads={self.nheads}, headdim={self.headdim}, d_state={self.d_state}, ngroups={self.ngroups}"


@torch.no_grad()
def draw_steps(bias: torch.Tensor) -> None:
    """Set ``bias`` so that its softplus, the step of a frame, is log-uniform in 0.001 to 0.1."""
    dt = torch.empty_like(bias).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


def scan_flops(length: int, heads: int, headdim: int, d_state: int, groups: int, *, directions: int) -> int:
    """Operations of the scan in chunks of 64 frames, whatever chunk a kernel uses.

    Per frame and direction: updating and reading the state (2 heads * headdim * d_state multiply-adds), and the two
    products within the chunk, C B^T and weights times x, at half their cost, since they are triangles.
    """
    chunk = 64
    per_direction = 2 * heads * headdim * d_state + (chunk * heads * headdim + chunk * groups * d_state) // 2
    return 2 * length * directions * per_direction
