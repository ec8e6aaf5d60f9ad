"""One causal Mamba layer (Gu and Dao, arXiv 2312.00752)."""

import torch
from torch import nn

from linconv import ops
from linconv.mixers.causal import CausalConv, CausalMixer, MambaState
from linconv.mixers.protocol import Linear, check_integer
from linconv.mixers.state_space import StateSpaceMixer, draw_steps
from linconv.ops.columns import split
from linconv.ops.linear import linear


class Mamba(CausalMixer, StateSpaceMixer):
    """Mamba with the selective scan, causal; its state dict has the names and shapes of `mamba_ssm`'s Mamba.

    in_proj.weight has the rows (x, z), x_proj.weight (dt, B, C); A_log is (d_inner, d_state), D (d_inner,).

    Args:
        d_model: width of the hidden states.
        d_state: size of each channel's state, 1 to 256.
        d_conv: width of the short convolution, 2 to 8.
        expand: d_inner / d_model, above 0.
        dt_rank: width that steps are projected from, at least 1; "auto" for d_model / 16, rounded up.

    Raises:
        TypeError, ValueError: an option has a wrong type or value; the message names it.
    """

    def __init__(self, d_model, d_state=16, d_conv=4, expand=2, dt_rank="auto"):
        super().__init__(d_model, d_state, d_conv, expand)
        if dt_rank == "auto":
            dt_rank = -(-d_model // 16)
        check_integer("dt_rank", dt_rank)
        if not self.d_inner:
            raise ValueError(f"expand is {expand}, wanted at least one channel of d_model = {d_model}")
        self.dt_rank = dt_rank
        self.state_shape = (self.d_inner, d_state)
        self.A_log = nn.Parameter(torch.empty(self.state_shape))
        self.D = nn.Parameter(torch.empty(self.d_inner))
        self.in_proj = Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = CausalConv(self.d_inner, d_conv)
        self.x_proj = Linear(self.d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = Linear(dt_rank, self.d_inner)
        self.out_proj = Linear(self.d_inner, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """As mamba_ssm's Mamba: -A is 1 to d_state in each channel, steps log-uniform in 0.001 to 0.1, D is 1."""
        super().reset_parameters()
        rates = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=self.A_log.device)
        self.A_log.copy_(rates.log().expand(self.state_shape))
        self.D.fill_(1)
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        draw_steps(self.dt_proj.bias)

    def forward(self, hidden_states, seq_lens=None, state: MambaState | None = None):
        """As `Mixer.forward`; ``state``, if given, is continued and updated to each row's last valid frame."""
        self.check_hidden_states(hidden_states)
        x, z = split(self.in_proj(hidden_states), (self.d_inner, self.d_inner))
        x = self.convolve(x, seq_lens, state)
        dt, B, C = self.x_proj(x).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        if type(self.dt_proj) is Linear:
            weight, dt_bias = self.dt_proj()
            dt = linear(dt, weight, None)  # the scan adds its bias, in fp32
        else:  # an adapter, or FSDP2's, which frees the weights after a call
            dt, dt_bias = self.dt_proj(dt), None
        y, last = ops.selective_scan(
            x,
            dt,
            self.A,
            B.unsqueeze(2),  # (b, L, 1, d_state)
            C.unsqueeze(2),
            D=self.D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=True,
            initial_states=None if state is None else state.ssm,
            return_final_states=True,
            seq_lens=seq_lens,
        )
        if state is not None:
            state.ssm = last.detach()
        return self.out_proj(y)

    def flops(self, length):
        """The scan needs seven per frame and state entry: dt A, its exponential, the added term, two to update the
        state and two to read it."""
        layers = (self.in_proj, self.conv1d, self.x_proj, self.dt_proj, self.out_proj)
        return length * (2 * sum(layer.weight.numel() for layer in layers) + 7 * self.d_inner * self.d_state)

    def extra_repr(self):
        return f"channels={self.d_inner}, d_state={self.d_state}, dt_rank={self.dt_rank}"
