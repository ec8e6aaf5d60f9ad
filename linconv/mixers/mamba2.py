"""One causal Mamba-2 layer (Dao and Gu, arXiv 2405.21060)."""

import dataclasses

import torch
from torch import nn

from linconv import ops
from linconv.mixers.protocol import GatedRMSNorm, Linear, StateSpaceMixer, scan_flops
from linconv.ops import checks


@dataclasses.dataclass
class Mamba2State:
    """What a causal layer remembers of the frames it has seen.

    conv (batch, d_conv - 1, conv_dim): the last inputs of the short convolution.
    ssm (batch, heads, headdim, d_state): the state of the scan, in fp32 at least.
    """

    conv: torch.Tensor
    ssm: torch.Tensor


class Mamba2(StateSpaceMixer):
    """Mamba-2, causal; its state dict has the names and shapes of `mamba_ssm`'s Mamba2.

    Args:
        d_model, d_state, d_conv, expand, headdim, ngroups, chunk_size: as for `BiMamba2`.

    Raises:
        TypeError, ValueError: options of another type, out of range or that do not fit; the message names the option.
    """

    causal = True

    def __init__(self, d_model, d_state=128, d_conv=4, expand=2, headdim=64, ngroups=1, chunk_size=None):
        super().__init__(d_model, d_state, d_conv, expand, headdim, ngroups, directions=1)
        self.conv_dim = self.d_inner + 2 * ngroups * d_state
        self.in_proj = Linear(d_model, self.d_inner + self.conv_dim + self.nheads, bias=False)
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim)  # holds the weights
        self.norm = GatedRMSNorm(self.d_inner)
        self.out_proj = Linear(self.d_inner, d_model, bias=False)
        self.reset_parameters()

    def forward(self, hidden_states, seq_lens=None, state: Mamba2State | None = None):
        """As `Mixer.forward`; with ``state``, goes on from it and leaves it at each row's last valid frame."""
        self.check_hidden_states(hidden_states)
        z, xBC, dt = self.in_proj(hidden_states).split((self.d_inner, self.conv_dim, self.nheads), dim=-1)
        conv_lens = seq_lens
        if state is not None:
            past = self.d_conv - 1
            xBC = torch.cat((state.conv.to(xBC.dtype), xBC), dim=1)  # (b, past + L, conv_dim)
            if seq_lens is None:
                state.conv = xBC[:, xBC.shape[1] - past :].detach()
            else:
                checks.sequence_bounds(seq_lens, None, *hidden_states.shape[:2], xBC.device)
                conv_lens = seq_lens + past
                last = seq_lens[:, None] + torch.arange(past, device=xBC.device)  # (b, past)
                state.conv = xBC.detach().gather(1, last[..., None].expand(-1, -1, self.conv_dim))
        xBC = ops.short_conv(xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias, seq_lens=conv_lens)
        xBC = xBC[:, xBC.shape[1] - hidden_states.shape[1] :]
        x, B, C = xBC.split((self.d_inner, self.ngroups * self.d_state, self.ngroups * self.d_state), dim=-1)
        y, last = ops.ssd(
            x.unflatten(-1, (self.nheads, self.headdim)),  # (b, L, heads, headdim)
            dt,
            self.A,
            B.unflatten(-1, (self.ngroups, self.d_state)),  # (b, L, groups, d_state)
            C.unflatten(-1, (self.ngroups, self.d_state)),
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            initial_states=None if state is None else state.ssm,
            return_final_states=True,
            seq_lens=seq_lens,
        )
        if state is not None:
            state.ssm = last.detach()
        group_size = self.d_inner // self.ngroups
        y = ops.gated_rms_norm(y.flatten(-2), z, self.norm.weight, group_size=group_size, seq_lens=seq_lens)
        return self.out_proj(y)

    def new_state(self, batch: int) -> Mamba2State:
        """The state before the first frame."""
        weight = self.in_proj.weight
        return Mamba2State(
            conv=weight.new_zeros(batch, self.d_conv - 1, self.conv_dim),
            ssm=self.A.new_zeros(batch, self.nheads, self.headdim, self.d_state),
        )

    def step(self, hidden_states: torch.Tensor, state: Mamba2State) -> torch.Tensor:
        """One more frame, (batch, d_model) to (batch, d_model); ``state`` is moved on by it.

        Raises:
            TypeError, ValueError: hidden_states of another type or shape.
        """
        checks.floating_tensor("hidden_states", hidden_states)
        checks.shape("hidden_states", hidden_states, (None, self.d_model), "(batch, d_model)")
        return self(hidden_states[:, None], state=state)[:, 0]

    def flops(self, length):
        projections = self.in_proj.weight.numel() + self.out_proj.weight.numel() + self.conv1d.weight.numel()
        scan = scan_flops(length, self.nheads, self.headdim, self.d_state, self.ngroups, directions=1)
        return 2 * length * projections + scan
