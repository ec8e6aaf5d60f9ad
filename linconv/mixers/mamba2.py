"""One causal Mamba-2 layer (Dao and Gu, arXiv 2405.21060)."""

import torch

from linconv import ops
from linconv.mixers.causal import CausalConv, CausalMixer, MambaState
from linconv.mixers.protocol import Linear
from linconv.mixers.state_space import GatedRMSNorm, SSDMixer, scan_flops
from linconv.ops.columns import split


class Mamba2(CausalMixer, SSDMixer):
    """Mamba-2, causal; its state dict has the names and shapes of `mamba_ssm`'s Mamba2.

    Args:
        d_model, d_state, d_conv, expand, headdim, ngroups, chunk_size: as for `BiMamba2`.

    Raises:
        TypeError, ValueError: an option has a wrong type or value, or does not fit the others; the message names it.
    """

    def __init__(self, d_model, d_state=128, d_conv=4, expand=2, headdim=64, ngroups=1, chunk_size=None):
        super().__init__(d_model, d_state, d_conv, expand, headdim, ngroups, chunk_size, directions=1)
        self.conv_dim = self.d_inner + 2 * ngroups * d_state
        self.state_shape = (self.nheads, headdim, d_state)
        self.in_proj = Linear(d_model, self.d_inner + self.conv_dim + self.nheads, bias=False)
        self.conv1d = CausalConv(self.conv_dim, d_conv)
        self.norm = GatedRMSNorm(self.d_inner)
        self.out_proj = Linear(self.d_inner, d_model, bias=False)
        self.reset_parameters()

    def forward(self, hidden_states, seq_lens=None, state: MambaState | None = None):
        """As `Mixer.forward`; ``state``, if given, is continued and updated to each row's last valid frame."""
        self.check_hidden_states(hidden_states)
        z, xBC, dt = split(self.in_proj(hidden_states), (self.d_inner, self.conv_dim, self.nheads))
        if state is None:
            return self.out_proj(self.conv_scan_norm(z, xBC, dt, seq_lens))
        xBC = self.convolve(xBC, seq_lens, state)
        x, B, C = xBC.split((self.d_inner, self.ngroups * self.d_state, self.ngroups * self.d_state), dim=-1)
        y, last = ops.ssd(
            torch.unflatten(x, -1, (self.nheads, self.headdim)),  # (b, L, heads, headdim)
            dt,
            self.A,
            torch.unflatten(B, -1, (self.ngroups, self.d_state)),  # (b, L, groups, d_state)
            torch.unflatten(C, -1, (self.ngroups, self.d_state)),
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            initial_states=state.ssm,
            return_final_states=True,
            seq_lens=seq_lens,
        )
        state.ssm = last.detach()
        return self.out_proj(self.gated_norm(y, z, seq_lens))

    def flops(self, length):
        projections = self.in_proj.weight.numel() + self.out_proj.weight.numel() + self.conv1d.weight.numel()
        scan = scan_flops(length, self.nheads, self.headdim, self.d_state, self.ngroups, directions=1)
        return 2 * length * projections + scan
