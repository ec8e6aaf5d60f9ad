"""The gated norm on Triton kernels: which tiles, which memory, which launches.

Forward is one launch. Backward saves nothing but its inputs and is two: dx and dz with the parts of the gradient of
weight, each of a few frames, and the sums of those. Nothing is read back to the host.
"""

from dataclasses import dataclass, replace

import torch
import triton

from linconv.ops.gated_rms_norm import triton_kernels as kernels
from linconv.ops.triton_frames import aligned_to, strides_of
from linconv.ops.triton_launch import ALL_REGISTERS, MATH, empty, launch, launched
from linconv.ops.triton_numbers import bits_of
from linconv.ops.triton_replay import replayed
from linconv.ops.triton_sums import sum_parts

FRAMES = 16  # that a part of the gradient of weight is the sum of


@dataclass(frozen=True)
class Tile:
    """`rows` frames by `columns` channels of a group. No field depends on batch or length, which would change bits."""

    rows: int
    columns: int
    warps: int


def choose_tile(group_size: int, directions: int, math: torch.dtype, gradient: bool) -> Tile:
    """The committed table, of every GPU: 16 elements a thread forward, 8 backward, in float64 half as many. On an H200
    they are the fastest of what benchmarks/tune_gpu_tiles.py tries, or within 4 % of it.

    A group of up to 4,096 channels is held in registers; half as many in float64, and for the gradients of two
    directions; a quarter for those in float64.
    """
    wide = math == torch.float64
    most = 4096 // ((4 if wide else directions) if gradient else (2 if wide else 1))
    columns = min(triton.next_power_of_2(group_size), most)
    of_a_warp = (256 if gradient else 512) // (2 if wide else 1)
    least, at_most = (4, 4 * of_a_warp) if gradient else (2, 2 * of_a_warp)
    rows = max(1, min(FRAMES, at_most // columns))
    return Tile(rows, columns, max(least, min(8, columns // of_a_warp)))  # of more, not each could have 255 registers


@dataclass
class Norm:
    """The arguments, as those of the operator: see csrc/gated_rms_norm/kernel.h."""

    x: torch.Tensor  # (1 or directions, batch, L, channels)
    z: torch.Tensor  # the same
    weight: torch.Tensor  # (directions, channels)
    eps: float
    group_size: int
    seq_lens: torch.Tensor | None

    def __post_init__(self):
        self.directions, self.channels = self.weight.shape
        _, self.batch, self.frames, _ = self.x.shape
        self.groups = self.channels // self.group_size
        self.math = torch.promote_types(self.x.dtype, torch.float32)

    def launch(self, kernel, tile: Tile, programs: int, frames: tuple, **arguments) -> None:
        """Runs a kernel; ``frames`` are its tensors of frames, ``programs`` what it has of them at each group."""
        launch(
            kernel,
            (programs * self.groups,),
            dict(
                x=self.x, z=self.z, weight=self.weight, seq_lens=self.seq_lens,
                lengths_stride=0 if self.seq_lens is None else self.seq_lens.stride(0), frames=self.frames,
                groups=self.groups, group_size=self.group_size,
                eps=bits_of(self.eps) if self.math == torch.float64 else self.eps, x_strides=strides_of(self.x),
                z_strides=strides_of(self.z), w_strides=self.weight.stride(), DIRECTIONS=self.directions,
                HELD=self.group_size <= tile.columns, ROWS=tile.rows, COLUMNS=tile.columns, MATH=MATH[self.math],
                VECTOR=aligned_to(self.x, self.z, *frames), **arguments,
            ),
            tile.warps,
            **ALL_REGISTERS,
        )  # fmt: skip


@replayed()
def gated_rms_norm(*arguments):
    """``linconv::gated_rms_norm_triton``."""
    norm = Norm(*arguments)
    tile = choose_tile(norm.group_size, norm.directions, norm.math, gradient=False)
    # In memory (batch, L, directions, channels): one projection reads a frame's directions side by side.
    y = empty((norm.batch, norm.frames, norm.directions, norm.channels), norm.x, norm.x.dtype).permute(2, 0, 1, 3)
    programs = norm.batch * triton.cdiv(norm.frames, tile.rows)
    norm.launch(kernels.normalize, tile, programs, (y,), y=y, y_strides=strides_of(y))
    return y


@replayed()
def gated_rms_norm_backward(grad, *arguments):
    """``linconv::gated_rms_norm_backward_triton``."""
    norm = Norm(*arguments)
    tile = choose_tile(norm.group_size, norm.directions, norm.math, gradient=True)
    dx, dz, dweight = (empty(t.shape, t, t.dtype) for t in (norm.x, norm.z, norm.weight))
    of_frames, of_group = norm.batch * triton.cdiv(norm.frames, FRAMES), triton.cdiv(norm.group_size, tile.columns)
    parts = empty((of_frames, dweight.numel()), norm.x, norm.math)
    norm.launch(
        kernels.differentiate, tile, of_frames * of_group, (grad, dx, dz), grad=grad, dx=dx, dz=dz, parts=parts,
        blocks=of_group, g_strides=strides_of(grad), dx_strides=strides_of(dx), dz_strides=strides_of(dz),
        SHARED_X=dx.shape[0] == 1, SHARED_Z=dz.shape[0] == 1, FRAMES=FRAMES,
    )  # fmt: skip
    sum_parts(parts, dweight)
    return dx, dz, dweight


@dataclass(frozen=True)
class Form:
    """How a mixer calls the norm: z is ``channels`` out of rows of ``row`` elements, which each direction has."""

    label: str
    channels: int
    row: int
    directions: int = 1
    shared_x: bool = False
    lengths: bool = True

    def builds(self, dtype: torch.dtype) -> list:
        batch, frames = 8, 1500
        x = torch.empty(
            1 if self.shared_x else self.directions, batch, frames, self.channels, dtype=dtype, device="meta"
        )
        rows = torch.empty(batch, frames, self.directions, self.row, dtype=dtype, device="meta").movedim(2, 0)
        weight = torch.empty(self.directions, self.channels, device="meta")
        lengths = torch.empty(batch, dtype=torch.int64, device="meta") if self.lengths else None

        def run():
            arguments = (x, rows[..., : self.channels], weight, 1e-5, self.channels, lengths)
            gated_rms_norm_backward(gated_rms_norm(*arguments), *arguments)

        return launched(run, f"{dtype}, {self.label}{', seq_lens' if self.lengths else ''}".removeprefix("torch."))


_BIMAMBA2 = Form("BiMamba2 of 1024", 1024, 2320, directions=2)
# With rows aligned to whole vectors in every type,
FORMS = (
    _BIMAMBA2,
    replace(_BIMAMBA2, lengths=False),
    Form("Hydra of 1024", 1024, 2336),
    Form("Mamba2 of 1024", 2048, 4384),
    Form("both directions of 1024", 1024, 1024, directions=2, shared_x=True),
)
# and to less.
LESS_ALIGNED = (
    Form("BiMamba2 of 768", 768, 1804, directions=2),
    Form("Hydra of 768", 768, 1816),
    Form("Mamba2 of 768", 1536, 3352),
)


def shipped():
    """The builds for what mixers of base and large models run, with fp32 parameters."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for form in (*FORMS, *(LESS_ALIGNED if dtype == torch.bfloat16 else ())):
            yield from form.builds(dtype)
