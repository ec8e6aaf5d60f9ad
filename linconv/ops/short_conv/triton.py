"""The short convolution on Triton kernels: which tiles, which memory, which launches.

Forward is one launch. Backward saves nothing but its inputs and is two: dx with each chunk's part of the other
gradients, and the sums of those. Directions that share x are one program's. Nothing is read back to the host.
"""

from dataclasses import dataclass, replace

import torch
import triton

from linconv.ops.short_conv import triton_kernels as kernels
from linconv.ops.triton_frames import aligned_to, strides_of
from linconv.ops.triton_launch import ALL_REGISTERS, MATH, empty, launch, launched
from linconv.ops.triton_replay import replayed
from linconv.ops.triton_sums import sum_parts

WARPS = 4


@dataclass(frozen=True)
class Tile:
    """What a program takes. No field depends on batch or length, which would change results' last bits.

    Attributes:
        slices: frames of a tile, each the first of those that it walks over.
        channels: of a tile.
        steps: of a slice: frames that it walks over, with those that only fill its registers.
        group: steps whose rows are asked for at once.
    """

    slices: int
    channels: int
    steps: int
    group: int


def choose_tile(width: int, together: int, math: torch.dtype, gradient: bool) -> Tile:
    """The committed table, of every GPU: on an H200 the fastest of what benchmarks/tune_gpu_tiles.py tries, or within
    4 % of it, in bfloat16 and for directions that are a program each; else what registers have room for.

    Args:
        width: of the filter.
        together: directions that a program has.
        math: what is computed in.
        gradient: whether it is that of the backward pass, which has two windows and sums in registers.
    """
    wide = math == torch.float64
    if not gradient:
        return Tile(4, 64 if wide else 128, 32, 2 if wide else 8)
    if together == 1 and not wide:
        return Tile(2, 128, 64, 4)
    narrow = together == 2 or width > 4
    return Tile(4, (64 if narrow else 128) // (2 if wide else 1), 32 if width <= 4 else 64, 2)


@dataclass
class Convolution:
    """The arguments, as those of the operator: see csrc/short_conv/kernel.h."""

    x: torch.Tensor  # (1 or directions, batch, L, channels)
    weight: torch.Tensor  # (directions, channels, width)
    bias: torch.Tensor | None  # (directions, channels)
    silu: bool
    reverse: bool
    lookahead: int
    seq_lens: torch.Tensor | None
    cu_seqlens: torch.Tensor | None

    def __post_init__(self):
        self.directions, self.channels, self.width = self.weight.shape
        _, self.batch, self.frames, _ = self.x.shape
        self.together = self.directions if self.x.shape[0] == 1 else 1
        self.math = torch.promote_types(self.x.dtype, torch.float32)

    def slots(self, chunk: int) -> int:
        """How many chunks there may be."""
        if self.cu_seqlens is not None:
            return self.frames // chunk + self.cu_seqlens.shape[0] - 1
        return self.batch * triton.cdiv(self.frames, chunk)

    def launch(self, kernel, tile: Tile, own: int, frames: tuple, **arguments) -> None:
        """Runs a kernel whose slices have so many frames of their own; ``frames`` are its tensors of frames."""
        packed = self.cu_seqlens is not None
        bounds = self.cu_seqlens if packed else self.seq_lens
        blocks = triton.cdiv(self.channels, tile.channels)
        launch(
            kernel,
            (self.slots(tile.slices * own) * blocks, self.directions // self.together),
            dict(
                x=self.x, weight=self.weight, bias=self.bias, bounds=bounds,
                bounds_stride=0 if bounds is None else bounds.stride(0),
                sequences=bounds.shape[0] - 1 if packed else self.batch, frames=self.frames, channels=self.channels,
                blocks=blocks, x_strides=strides_of(self.x), w_strides=self.weight.stride(),
                b_strides=(0, 0) if self.bias is None else self.bias.stride(), TOGETHER=self.together,
                WIDTH=self.width, LOOKAHEAD=self.lookahead, REVERSE=self.reverse, SILU=self.silu, PACKED=packed,
                SLICES=tile.slices, CHANNELS=tile.channels, STEPS=tile.steps, GROUP=tile.group,
                MATH=MATH[self.math], VECTOR=aligned_to(self.x, *frames), **arguments,
            ),
            WARPS,
            **ALL_REGISTERS,
        )  # fmt: skip


@replayed()
def short_conv(*arguments):
    """``linconv::short_conv_triton``."""
    conv = Convolution(*arguments)
    tile = choose_tile(conv.width, conv.together, conv.math, gradient=False)
    y = empty((conv.directions, conv.batch, conv.frames, conv.channels), conv.x, conv.x.dtype)
    own = tile.steps if conv.together == 1 else tile.steps - (conv.width - 1)
    conv.launch(kernels.convolve, tile, own, (y,), y=y, y_strides=strides_of(y))
    return y


@replayed()
def short_conv_backward(grad, *arguments):
    """``linconv::short_conv_backward_triton``."""
    conv = Convolution(*arguments)
    tile = choose_tile(conv.width, conv.together, conv.math, gradient=True)
    own = tile.steps - (conv.width - 1)
    dx = empty(conv.x.shape, conv.x, conv.x.dtype)
    dweight = empty(conv.weight.shape, conv.x, conv.weight.dtype)
    dbias = empty(conv.weight.shape[:2], conv.x, (conv.weight if conv.bias is None else conv.bias).dtype)
    # Of each chunk: dweight, and behind it dbias.
    parts = empty((conv.slots(tile.slices * own), dweight.numel() + dbias.numel()), conv.x, conv.math)
    conv.launch(
        kernels.differentiate, tile, own, (grad, dx), grad=grad, g_strides=strides_of(grad), dx=dx,
        dx_strides=strides_of(dx), parts=parts,
    )  # fmt: skip
    sum_parts(parts, dweight, dbias)
    return dx, dweight, dbias


@dataclass(frozen=True)
class Form:
    """How a mixer calls the convolution: ``channels`` out of rows of ``row`` elements, which each direction has."""

    label: str
    channels: int
    row: int
    width: int = 4
    lookahead: int = 0
    directions: int = 1
    shared: bool = False
    bounds: str = "seq_lens"

    def builds(self, dtype: torch.dtype) -> list:
        batch, frames = 1 if self.bounds == "cu_seqlens" else 8, 1500
        of_x = 1 if self.shared else self.directions
        rows = torch.empty(batch, frames, of_x, self.row, dtype=dtype, device="meta").movedim(2, 0)
        weight = torch.empty(self.directions, self.channels, self.width, device="meta")
        lengths = torch.empty(9 if self.bounds == "cu_seqlens" else batch, dtype=torch.int64, device="meta")
        bounds = [lengths if self.bounds == name else None for name in ("seq_lens", "cu_seqlens")]

        def run():
            x = rows[..., : self.channels]
            arguments = (x, weight, weight[..., 0].contiguous(), True, False, self.lookahead, *bounds)
            short_conv_backward(short_conv(*arguments), *arguments)

        return launched(run, f"{dtype}, {self.label}{self.bounds and f', {self.bounds}'}".removeprefix("torch."))


_MAMBA2 = Form("Mamba2 of 1024", 2304, 4384)
# With rows aligned to whole vectors in every type,
FORMS = (
    _MAMBA2,
    replace(_MAMBA2, bounds=""),
    replace(_MAMBA2, bounds="cu_seqlens"),
    Form("Hydra of 1024", 1280, 2336, width=7, lookahead=3),
    Form("both directions of 1024", 1024, 1024, directions=2, shared=True),
)
# and to less.
LESS_ALIGNED = (
    Form("Mamba2 of 768", 1792, 3352),
    Form("BiMamba2 of 768", 1024, 1804, directions=2),
    Form("Hydra of 768", 1024, 1816, width=7, lookahead=3),
)


def shipped():
    """The builds for what mixers of base and large models run, with fp32 parameters."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for form in (*FORMS, *(LESS_ALIGNED if dtype == torch.bfloat16 else ())):
            yield from form.builds(dtype)
