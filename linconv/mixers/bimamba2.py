"""Two Mamba-2 layers over the same frames, one in each direction of time, summed (CALD, arXiv 2410.06846)."""

from collections.abc import Mapping

import torch
from torch import nn

from linconv.mixers.protocol import Linear
from linconv.mixers.state_space import DepthwiseConv, GatedRMSNorm, SSDMixer, scan_flops
from linconv.ops import checks
from linconv.ops.columns import split

# How a parameter of mamba_ssm's Mamba2 lies in the stacked one: as row block, column block or entry `direction`.
_ROWS, _COLUMNS = ("in_proj.weight",), ("out_proj.weight",)


class BiMamba2(SSDMixer):
    """Forward and backward Mamba-2 as one computation: each of its five steps handles both directions at once.

    Neither the input nor a state is flipped or copied. The parameters are those of two `mamba_ssm` Mamba2 layers
    without linear bias, with convolution bias and gated RMS norm (eps 1e-5, after the gate), stacked:
    in_proj.weight (2 d_in_proj, d_model), forward rows (z, x, B, C, dt) first; conv1d.weight (2, conv_dim, d_conv) and
    conv1d.bias (2, conv_dim); A_log, D, dt_bias (2, heads); norm.weight (2, d_inner); out_proj.weight
    (d_model, 2 d_inner), forward columns first.

    Args:
        d_model: width of the hidden states.
        d_state: size of each head's state per channel, 1 to 256.
        d_conv: width of the short convolution, 2 to 8.
        expand: d_inner / d_model, above 0.
        headdim: channels per head, 1 to 256, a divisor of d_inner.
        ngroups: groups of heads that share B and C.
        chunk_size: accepted for compatibility with mamba_ssm, but not used: kernels choose their chunks.

    Raises:
        TypeError, ValueError: an option has a wrong type or value, or does not fit the others; the message names it.
    """

    def __init__(self, d_model, d_state=128, d_conv=4, expand=1, headdim=64, ngroups=1, chunk_size=None):
        super().__init__(d_model, d_state, d_conv, expand, headdim, ngroups, chunk_size, directions=2)
        self.conv_dim = self.d_inner + 2 * ngroups * d_state
        self.d_in_proj = self.d_inner + self.conv_dim + self.nheads
        self.in_proj = Linear(d_model, 2 * self.d_in_proj, bias=False)
        self.conv1d = DepthwiseConv(2, self.conv_dim, width=d_conv)
        self.norm = GatedRMSNorm(2, self.d_inner)
        self.out_proj = Linear(2 * self.d_inner, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self):
        super().reset_parameters()
        # Each direction's output projection is initialised as in a separate layer, by its own fan-in.
        bound = self.d_inner**-0.5
        nn.init.uniform_(self.out_proj.weight, -bound, bound)

    def forward(self, hidden_states, seq_lens=None):
        self.check_hidden_states(hidden_states)
        # Split before moving directions first: gradients are then joined in the projection's layout, with one copy.
        columns = self.in_proj(hidden_states)
        columns = columns.view(*columns.shape[:-1], 2, self.d_in_proj)  # (b, L, 2, d_in_proj)
        parts = split(columns, (self.d_inner, self.conv_dim, self.nheads))
        y = self.conv_scan_norm(*(part.movedim(-2, 0) for part in parts), seq_lens)  # (2, b, L, d_inner)
        return self.out_proj(y.movedim(0, -2).flatten(-2))  # (b, L, 2 d_inner), a view

    def flops(self, length):
        projections = self.in_proj.weight.numel() + self.out_proj.weight.numel() + self.conv1d.weight.numel()
        scan = scan_flops(length, self.nheads, self.headdim, self.d_state, self.ngroups, directions=2)
        return 2 * length * projections + scan

    @torch.no_grad()
    def load_mamba_ssm(self, forward_layer: dict, backward_layer: dict) -> None:
        """Load the weights of two `mamba_ssm` Mamba2 layers from their state dicts.

        Raises:
            TypeError: an argument is not a state dict, or holds something other than tensors.
            ValueError: names or shapes are not those of a Mamba2 of these sizes.
        """
        wanted = self.mamba_ssm_state_dicts()
        for argument, given, own in zip(("forward_layer", "backward_layer"), (forward_layer, backward_layer), wanted):
            if not isinstance(given, Mapping):
                raise TypeError(f"{argument} is {type(given).__name__}, wanted the state dict of a Mamba2")
            if given.keys() != own.keys():
                missing, unknown = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys(), key=str)
                raise ValueError(f"{argument} lacks {missing} and has {unknown}, wanted the names {sorted(own)}")
            for name, tensor in given.items():
                checks.tensor(f"{argument}[{name!r}]", tensor)
                if tensor.shape != own[name].shape:
                    shapes = tuple(tensor.shape), tuple(own[name].shape)
                    raise ValueError(f"{argument}[{name!r}] has shape {shapes[0]}, wanted {shapes[1]}")
        for given, own in zip((forward_layer, backward_layer), wanted):
            for name, tensor in given.items():
                own[name].copy_(tensor)

    def mamba_ssm_state_dicts(self) -> tuple[dict, dict]:
        """The two directions as state dicts of `mamba_ssm`'s Mamba2; the tensors are views of this layer's own."""
        stacked = self.state_dict()
        halves = {}, {}
        for direction, half in enumerate(halves):
            for name, tensor in stacked.items():
                if name in _ROWS:
                    half[name] = tensor.chunk(2, dim=0)[direction]
                elif name in _COLUMNS:
                    half[name] = tensor.chunk(2, dim=1)[direction]
                elif name == "conv1d.weight":
                    half[name] = tensor[direction].unsqueeze(1)  # (conv_dim, 1, d_conv), as torch.nn.Conv1d
                else:
                    half[name] = tensor[direction]
        return halves
