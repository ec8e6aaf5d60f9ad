"""Hydra: both directions of time as one quasiseparable matrix over shared inputs (arXiv 2407.09941)."""

from linconv.mixers.protocol import Linear
from linconv.mixers.state_space import DepthwiseConv, GatedRMSNorm, SSDMixer, scan_flops
from linconv.ops.columns import split


class Hydra(SSDMixer):
    """Bidirectional state space mixer whose directions share x, z, A and the norm, and have their own dt, B and C.

    Each direction's scan moves one frame later, so that both are strictly triangular and D alone is the diagonal.
    The short convolution is centred. Unlike in the paper's code, D does not depend on the frame.

    in_proj.weight has the rows (z, x, B_f, C_f, B_b, C_b, dt_f, dt_b), conv1d.weight (conv_dim, d_conv), A_log, D and
    dt_bias (heads,), norm.weight (d_inner,), out_proj.weight (d_model, d_inner).

    Args:
        d_model: width of the hidden states.
        d_state: size of each head's state per channel, 1 to 256.
        d_conv: width of the centred convolution, odd, 3 to 7.
        expand, headdim, ngroups, chunk_size: as for `BiMamba2`.

    Raises:
        TypeError, ValueError: an option has a wrong type or value, or does not fit the others; the message names it.
    """

    def __init__(self, d_model, d_state=64, d_conv=7, expand=1, headdim=64, ngroups=1, chunk_size=None):
        super().__init__(d_model, d_state, d_conv, expand, headdim, ngroups, chunk_size, directions=1)
        if d_conv % 2 == 0:
            raise ValueError(f"d_conv is {d_conv}, wanted an odd width: the convolution is centred")
        self.conv_dim = self.d_inner + 4 * ngroups * d_state
        self.in_proj = Linear(d_model, self.d_inner + self.conv_dim + 2 * self.nheads, bias=False)
        self.conv1d = DepthwiseConv(self.conv_dim, width=d_conv)
        self.norm = GatedRMSNorm(self.d_inner)
        self.out_proj = Linear(self.d_inner, d_model, bias=False)
        self.reset_parameters()

    def forward(self, hidden_states, seq_lens=None):
        self.check_hidden_states(hidden_states)
        z, xBC, dt = split(self.in_proj(hidden_states), (self.d_inner, self.conv_dim, 2 * self.nheads))
        dt = dt.view(*dt.shape[:-1], 2, self.nheads).movedim(-2, 0)  # (2, b, L, heads)
        return self.out_proj(self.conv_scan_norm(z, xBC, dt, seq_lens, diagonal="shifted", lookahead=self.d_conv // 2))

    def flops(self, length):
        projections = self.in_proj.weight.numel() + self.out_proj.weight.numel() + self.conv1d.weight.numel()
        scan = scan_flops(length, self.nheads, self.headdim, self.d_state, self.ngroups, directions=2)
        return 2 * length * projections + scan
