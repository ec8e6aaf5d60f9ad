"""Shared parts of causal mixers: a state that continues across calls, and a short convolution that uses it."""

import dataclasses

import torch
from torch import nn

from linconv import ops
from linconv.mixers.protocol import Weights, check_integer
from linconv.ops import checks


@dataclasses.dataclass
class MambaState:
    """The memory of a causal layer of past frames.

    conv (batch, d_conv - 1, channels): the last inputs of the short convolution.
    ssm (batch, ..., d_state): the state of the scan, at least fp32.
    """

    conv: torch.Tensor
    ssm: torch.Tensor


def check_state(state) -> None:
    """Raise TypeError if ``state`` is not a `MambaState`."""
    if not isinstance(state, MambaState):
        raise TypeError(f"state is {type(state).__name__}, wanted a MambaState, from new_state(batch)")


class CausalConv(Weights, nn.Conv1d):
    """Holds the weights of a short convolution as mamba_ssm does, in a torch.nn.Conv1d with one channel per group."""

    def __init__(self, channels: int, width: int):
        super().__init__(channels, channels, width, groups=channels)

    def forward(self):
        return self.weight.squeeze(1), self.bias


class CausalMixer:
    """The causal side of a `StateSpaceMixer`; a subclass sets ``conv1d`` and the ``state_shape`` of its scan.

    conv1d is a `CausalConv`, which only holds the weights; `linconv.ops` computes the convolution.
    """

    causal = True
    state_shape: tuple[int, ...]

    def convolve(self, x, seq_lens, state: MambaState | None):
        """The short convolution and SiLU of (batch, L, channels); updates ``state`` to each row's last valid frame."""
        weight, bias = self.conv1d()
        if state is None:
            return ops.short_conv(x, weight, bias, seq_lens=seq_lens)
        check_state(state)
        past, length = self.d_conv - 1, x.shape[1]
        checks.shape("state.conv", state.conv, (x.shape[0], past, x.shape[2]), "(batch, d_conv - 1, channels)")
        x = torch.cat((state.conv.to(x.dtype), x), dim=1)  # (b, past + L, channels)
        if seq_lens is None:
            state.conv = x[:, length:].detach().clone()  # a view would keep all frames
        else:
            checks.sequence_bounds(seq_lens, None, x.shape[0], length, x.device)
            last = seq_lens[:, None] + torch.arange(past, device=x.device)  # (b, past)
            state.conv = x.detach().gather(1, last[..., None].expand(-1, -1, x.shape[-1]))
            seq_lens = seq_lens + past
        return ops.short_conv(x, weight, bias, seq_lens=seq_lens)[:, past:]

    def new_state(self, batch: int) -> MambaState:
        """The state of ``batch`` rows before the first frame, on the CPU if the weights are offloaded.

        Raises:
            TypeError, ValueError: batch is not an integer of at least 0.
        """
        if not torch.compiler.is_compiling():  # then it may be a symbol
            check_integer("batch", batch, low=0)
        weight, A = self.conv1d.weight, self.A
        device = "cpu" if weight.is_meta else weight.device
        return MambaState(
            conv=torch.zeros(batch, self.d_conv - 1, weight.shape[0], dtype=weight.dtype, device=device),
            ssm=torch.zeros(batch, *self.state_shape, dtype=A.dtype, device=device),
        )

    def step(self, hidden_states: torch.Tensor, state: MambaState) -> torch.Tensor:
        """Process one more frame, (batch, d_model) to (batch, d_model), and update ``state``.

        Raises:
            TypeError, ValueError: hidden_states has a wrong type or shape, or state is no `MambaState` of this batch.
        """
        check_state(state)
        checks.floating_tensor("hidden_states", hidden_states)
        checks.shape("hidden_states", hidden_states, (None, self.d_model), "(batch, d_model)")
        return self(hidden_states[:, None], state=state)[:, 0]
