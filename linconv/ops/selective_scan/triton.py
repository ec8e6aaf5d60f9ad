"""The selective scan on Triton kernels: which tiles, which memory, which launches.

Forward is three launches: what each chunk makes of a state of zero, the states that enter each chunk, the outputs; one
where a chunk has all frames, with the same bits. Backward saves nothing but its inputs and is four: the first two
again, for states and their gradients at once; gradients, some as parts; the sums of those. Nothing is read back to the
host.
"""

import functools
from dataclasses import dataclass

import torch
import triton

from linconv.ops.selective_scan import triton_kernels as kernels
from linconv.ops.ssd.arguments import math_dtype
from linconv.ops.triton_launch import ALL_REGISTERS, MATH, empty, launch, launched
from linconv.ops.triton_replay import replayed

PASSED, SUMMED = 256, 32  # elements of a program that passes states from chunk to chunk, or sums parts
AS_WRITTEN = {"enable_fp_fusion": False}  # an option: the kernels say themselves which multiply-adds are fused


@dataclass(frozen=True)
class Tiles:
    """How the work is cut. No field depends on batch or length, which would change results' last bits.

    Attributes:
        chunk, gradient_chunk: steps of a chunk, forward and backward: a multiple of those of its tiles.
        steps, channels, warps: of a tile of `advance` and `scan`.
        gradient_steps, gradient_channels, gradient_warps: of a tile of `differentiate`.
    """

    chunk: int
    steps: int
    channels: int
    warps: int
    gradient_chunk: int
    gradient_steps: int
    gradient_channels: int
    gradient_warps: int


def choose_tiles(dstate: int, x: torch.Tensor) -> Tiles:
    """The committed table, of every GPU: what registers have room for.

    Forward a thread has 64 registers of each block (steps, dstate, channels), 32 in float32, whose powers of two take
    some. Backward it has 16, since more blocks are needed at once, and 64 of the states that enter a chunk's tiles.
    """
    held = 32 if x.dtype == torch.float32 else 64
    registers = triton.next_power_of_2(dstate) * math_dtype(x).itemsize // 4  # of one channel's state
    warps, gradient_warps = (min(8, max(1, registers // of_a_warp)) for of_a_warp in (16, 4))
    wide = registers > 32
    return Tiles(
        chunk=64, steps=min(16, max(1, held * warps // registers)), channels=32, warps=warps,
        gradient_chunk=16 if wide else 64, gradient_steps=2 if wide else min(16, 16 * gradient_warps // registers),
        gradient_channels=2048 // registers if wide else 32, gradient_warps=gradient_warps,
    )  # fmt: skip


@dataclass
class Call:
    """The arguments of either operator, and how the work of one is cut."""

    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    z: torch.Tensor | None
    dt_bias: torch.Tensor | None
    dt_softplus: bool
    initial_states: torch.Tensor | None
    seq_lens: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    reverse: bool
    gradient: bool = False

    def __post_init__(self):
        self.batch, self.frames, self.channels = self.x.shape
        self.groups, self.dstate = self.B.shape[2:]
        self.math = math_dtype(self.x)
        self.bounds = self.cu_seqlens if self.cu_seqlens is not None else self.seq_lens
        self.kind = "cu_seqlens" if self.cu_seqlens is not None else "seq_lens" if self.seq_lens is not None else ""
        self.sequences = self.batch if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
        self.tiles = choose_tiles(self.dstate, self.x)
        self.chunk = self.tiles.gradient_chunk if self.gradient else self.tiles.chunk
        if self.cu_seqlens is not None:
            self.slots = self.frames // self.chunk + self.sequences
        else:
            self.slots = self.batch * triton.cdiv(max(self.frames, 1), self.chunk)

    def blocks(self, channels: int) -> int:
        """How many blocks of so many channels a group has."""
        return triton.cdiv(self.channels // self.groups, channels)

    def empty(self, *shape, dtype=None):
        return empty(shape, self.x, dtype or self.math)

    def places(self) -> dict:
        return dict(bounds=self.bounds, frames=self.frames, KIND=self.kind, Q=self.chunk, MATH=MATH[self.math])

    def launch(self, kernel, steps: int, channels: int, warps: int, **arguments) -> None:
        """Runs a kernel whose programs go through the steps of a chunk, in tiles of so many steps and channels."""
        launch(
            kernel,
            (self.slots, self.blocks(channels) * self.groups),
            dict(
                x=self.x, dt=self.dt, A=self.A, B=self.B, C=self.C, z=self.z, dt_bias=self.dt_bias,
                sequences=self.sequences, channels=self.channels, group_channels=self.channels // self.groups,
                dstate=self.dstate, SOFTPLUS=self.dt_softplus, REVERSE=self.reverse, T=steps, BC=channels,
                N=triton.next_power_of_2(self.dstate), **self.places(), **_strides(x=self.x, dt=self.dt, z=self.z),
                **_strides("btgn", B=self.B, C=self.C), **_strides("cn", A=self.A),
                **_strides("c", bias=self.dt_bias), **arguments,
            ),
            warps,
            **ALL_REGISTERS,
            **AS_WRITTEN,
        )  # fmt: skip

    def between(self, dy=None, dlast=None):
        """The states that enter each chunk, (1, slots, dstate, channels), and with dy gradients of those that leave it
        behind them. None where there is one chunk."""
        if self.frames <= self.chunk:
            return None
        kinds = 1 if dy is None else 2
        states = self.empty(kinds, self.slots, self.dstate, self.channels)
        time = self.empty(self.slots, self.channels)
        tiles = self.tiles
        self.launch(
            kernels.advance, tiles.steps, tiles.channels, tiles.warps, dy=dy, states=states, time_of=time,
            slots=self.slots, **_strides(dy=dy), GRADIENT=dy is not None,
        )  # fmt: skip
        launch(
            kernels.pass_states,
            (self.sequences * triton.cdiv(self.channels * self.dstate, PASSED), kinds),
            dict(
                states=states, time_of=time, A=self.A, initial=self.initial_states, dlast=dlast, slots=self.slots,
                channels=self.channels, dstate=self.dstate, **self.places(), **_strides("cn", A=self.A),
                **_strides("scn", initial=self.initial_states, dlast=dlast), BLOCK=PASSED, STAGES=4,
            ),
            2, 4, **AS_WRITTEN,
        )  # fmt: skip
        return states


def _strides(axes: str = "btc", **tensors) -> dict:
    """Strides of tensors by their names and those of their axes; 0 of one that is None."""
    return {
        f"{name}_{axis}": stride
        for name, tensor in tensors.items()
        for axis, stride in zip(axes, (0,) * len(axes) if tensor is None else tensor.stride())
    }


@replayed()
def selective_scan(*arguments):
    """``linconv::selective_scan_triton``."""
    call = Call(*arguments)
    tiles = call.tiles
    y = call.empty(*call.x.shape, dtype=call.x.dtype)
    last = call.empty(call.sequences, call.channels, call.dstate)
    call.launch(
        kernels.scan, tiles.steps, tiles.channels, tiles.warps, D=call.D, states=call.between(),
        initial=call.initial_states, y=y, last=last, **_strides("c", D=call.D),
        **_strides("scn", initial=call.initial_states),
    )  # fmt: skip
    return y, last


@replayed()
def selective_scan_backward(dy, dfinal_states, *arguments):
    """``linconv::selective_scan_backward_triton``."""
    call = Call(*arguments, gradient=True)
    tiles = call.tiles

    def like(argument):
        return call.empty(0) if argument is None else call.empty(*argument.shape, dtype=argument.dtype)

    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial = (
        like(t) for t in (call.x, call.dt, call.A, call.B, call.C, call.D, call.z, call.dt_bias, call.initial_states)
    )
    blocks = call.blocks(tiles.gradient_channels)
    of_groups = (blocks, call.batch, call.frames, call.groups, call.dstate)
    parts = dict(
        dA=call.empty(call.slots, call.channels, call.dstate), dB=call.empty(*of_groups), dC=call.empty(*of_groups),
        dD=call.empty(call.slots, dD.numel()), dbias=call.empty(call.slots, dbias.numel()),
    )  # fmt: skip
    call.launch(
        kernels.differentiate, tiles.gradient_steps, tiles.gradient_channels, tiles.gradient_warps, dy=dy, D=call.D,
        states=call.between(dy, dfinal_states), initial=call.initial_states, dlast=dfinal_states, dx=dx, ddt=ddt,
        dz=dz, dinitial=dinitial if call.initial_states is not None else None, slots=call.slots, **parts,
        **_strides(dy=dy), **_strides("c", D=call.D),
        **_strides("scn", initial=call.initial_states, dlast=dfinal_states),
    )  # fmt: skip
    sums = dict(dA=dA, dB=dB, dC=dC, dD=dD, dbias=dbias)
    launch(
        kernels.sum_parts,
        (sum(triton.cdiv(t.numel(), SUMMED) for t in sums.values()),),
        dict(
            **sums, **{f"{name}_parts": tensor for name, tensor in parts.items()}, slots=call.slots, blocks=blocks,
            A_size=dA.numel(), B_size=dB.numel(), D_size=dD.numel(), bias_size=dbias.numel(),
            PARTS=64, COLUMNS=SUMMED,
        ),
        4,
    )  # fmt: skip
    return dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial


# dtype, channels of layers as Mamba 130m and 370m have them.
SHIPPED = (*((dtype, 1536) for dtype in (torch.bfloat16, torch.float16, torch.float32)), (torch.bfloat16, 2048))
# What builds differ by, besides: lengths, states.
FORMS = {"seq_lens": (True, False), "whole": (False, False), "whole, states": (False, True)}


def _run(dtype, channels, lengths, states):
    batch, frames, dstate = 8, 4096, 16

    def tensor(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, dt, z = (tensor(batch, frames, channels, dtype=dtype) for _ in range(3))
    B, C = (tensor(batch, frames, 1, dstate, dtype=dtype) for _ in range(2))
    initial = tensor(batch, channels, dstate) if states else None
    seq_lens = tensor(batch, dtype=torch.int64) if lengths else None
    arguments = (
        x, dt, tensor(channels, dstate), B, C, tensor(channels), z, tensor(channels), True, initial, seq_lens, None,
        False,
    )  # fmt: skip
    selective_scan(*arguments)
    selective_scan_backward(x, initial, *arguments)


def shipped(capability: int = 90):
    """The builds for the usual sizes, with D, z, dt_bias and softplus; the committed table is of every GPU."""
    for dtype, channels in SHIPPED:
        for form, (lengths, states) in FORMS.items():
            label = f"{str(dtype)[6:]}, {channels} channels, dstate 16: {form}"
            yield from launched(functools.partial(_run, dtype, channels, lengths, states), label, capability)
