"""Linformer attention on Triton kernels: which tiles, which memory, which launches.

Forward is a projection each of keys and values, cut into splits of the frames whose sums a second launch adds in order,
and one launch of attention: a tile of queries passes once over the r keys, which all its neighbours read too and which
stay in the L2 cache. Backward of attention recomputes the weights: one launch for dq and each query's normaliser, one
for the parts of dk and dv, two for their sums. Nothing is read back to the host.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from linconv.ops import triton_launch
from linconv.ops.linformer import triton_kernels as kernels
from linconv.ops.triton_launch import ALL_REGISTERS, capability_of, empty, launch, launched
from linconv.ops.triton_numbers import bits_of
from linconv.ops.triton_replay import replayed

MATH = {**triton_launch.MATH, torch.bfloat16: tl.bfloat16}
PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}
MOST_HEADDIM_OF_THREE = 128  # with more columns, three TF32 products spill registers: they are IEEE float32
SPLIT_FRAMES, MOST_SPLITS, SPLIT_MULTIPLE = 512, 16, 64  # as in csrc/linformer/kernel.h


@dataclass(frozen=True)
class Tiles:
    """How the work is cut. No field depends on batch or length, which would change results' last bits.

    Attributes:
        frames, ranks: of a tile of scores, of a projection, or of its gradient.
        columns: of headdim of a tile of a projection.
        gradient_frames, gradient_ranks: of a tile of the gradients of attention.
        key_ranks: ranks of a tile of keys' and values' gradients.
        warps, gradient_warps, stages: of each kernel.
    """

    frames: int
    ranks: int
    columns: int
    gradient_frames: int
    gradient_ranks: int
    key_ranks: int
    warps: int = 4
    gradient_warps: int = 8
    stages: int = 2


# Frames, ranks, ranks of keys, and warps of the gradients for heads of up to 64, 128 and 256 columns.
FLOAT32_GRADIENTS = {
    "ieee": ((32, 32, 32, 8), (16, 16, 16, 4), (16, 16, 16, 8)),
    "tf32": ((32, 32, 32, 8), (32, 16, 16, 4), (16, 32, 16, 8)),
    "tf32x3": ((16, 32, 32, 8), (16, 16, 16, 4)),
}


def choose_tiles(operand: torch.dtype, precision: str, headdim: int, capability: int) -> Tiles:
    """The committed table: tiles by the type that products are taken in, the size of a head, and the GPU."""
    D = _power(headdim)
    if operand == torch.float64:
        return Tiles(
            frames=16, ranks=16, columns=min(D, 32), gradient_frames=16, gradient_ranks=16, key_ranks=16, stages=1
        )
    if operand == torch.float32:
        wide, newest = D > 64, capability >= 100
        frames, ranks, key_ranks, gradient_warps = FLOAT32_GRADIENTS[precision][0 if D <= 64 else 1 if D <= 128 else 2]
        warps = 8 if precision == "tf32x3" or (wide and not (precision == "tf32" and newest)) else 4
        if precision == "ieee":
            gradient_warps = 8 if newest else 4 if D > 128 else gradient_warps
        elif precision == "tf32" and not newest:
            gradient_warps = 8
        return Tiles(
            frames=16 if wide else 32, ranks=32, columns=min(D, 64), gradient_frames=frames, gradient_ranks=ranks,
            key_ranks=key_ranks, warps=warps, gradient_warps=gradient_warps, stages=1,
        )  # fmt: skip
    if D <= 64:
        gradient_ranks = 64 if capability >= 90 else 32
        return Tiles(64, 64, D, gradient_frames=64, gradient_ranks=gradient_ranks, key_ranks=gradient_ranks)
    if D <= 128:
        return Tiles(64, 32, 64, gradient_frames=64, gradient_ranks=32, key_ranks=32, warps=8, stages=1)
    return Tiles(64, 32, 64, gradient_frames=32, gradient_ranks=16, key_ranks=16, warps=8, stages=1)


def _power(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _empty_frames(like: torch.Tensor) -> torch.Tensor:
    batch, heads, length, headdim = like.shape
    return empty((batch, length, heads, headdim), like, like.dtype).transpose(1, 2)


def _splits(frames: int) -> int:
    """The most splits that a sequence of at most so many frames has."""
    return min(MOST_SPLITS, max(1, triton.cdiv(frames, SPLIT_FRAMES)))


def _math(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _settings() -> tuple:
    """What launches depend on besides the arguments."""
    return (torch.get_float32_matmul_precision(),)


def _options(x: torch.Tensor) -> tuple[torch.dtype, dict]:
    """The type that products are taken in, and what every kernel is told of the arithmetic.

    fp16 goes through TF32, which has its mantissa: projected keys may be beyond its range.
    """
    operand = torch.bfloat16 if x.dtype == torch.bfloat16 else _math(x)
    low = x.dtype in (torch.float16, torch.bfloat16)
    precision = "tf32" if low else PRECISIONS[torch.get_float32_matmul_precision()]
    if operand == torch.float64 or (precision == "tf32x3" and x.shape[-1] > MOST_HEADDIM_OF_THREE):
        precision = "ieee"
    return operand, {"MATH": MATH[_math(x)], "OPERAND": MATH[operand], "PRECISION": precision}


def _tiles(x: torch.Tensor, operand: torch.dtype, options: dict) -> Tiles:
    return choose_tiles(operand, options["PRECISION"], x.shape[-1], capability_of(x))


def _strides(name: str, tensor: torch.Tensor, axes: str) -> dict:
    return {f"{name}_{axis}": stride for axis, stride in zip(axes, tensor.stride())}


def _split_options() -> dict:
    return dict(SPLIT=SPLIT_FRAMES, MOST=MOST_SPLITS, MULTIPLE=SPLIT_MULTIPLE)


def _sum(parts, out, seq_lens, frames, normalize):
    """out = the sum of each row's and head's own parts, over the root of its length if normalize."""
    batch, heads, splits, rank, headdim = parts.shape
    size, block = rank * headdim, 1024
    launch(
        kernels.sum_parts,
        (batch * heads, triton.cdiv(size, block)),
        dict(
            parts=parts, out=out, bounds=seq_lens, frames=frames, heads=heads, splits=splits, size=size,
            NORMALIZE=normalize, BLOCK=block, MATH=MATH[parts.dtype], **_split_options(),
        ),
        4,
        1,
    )  # fmt: skip


@replayed(_settings)
def linformer_project(x, proj, normalize, seq_lens):
    """``linconv::linformer_project_triton``."""
    batch, heads, frames, headdim = x.shape
    rank, splits = proj.shape[2], _splits(frames)
    operand, options = _options(x)
    tiles = _tiles(x, operand, options)
    parts = empty((batch, heads, splits, rank, headdim), x, _math(x))
    blocks = triton.cdiv(headdim, tiles.columns)
    launch(
        kernels.project,
        (batch * heads, triton.cdiv(rank, tiles.ranks) * blocks, splits),
        dict(
            x=x, proj=proj, parts=parts, bounds=seq_lens, frames=frames, heads=heads, rank=rank, headdim=headdim,
            splits=splits, column_blocks=blocks, **_strides("x", x, "bhtc"), **_head_strides(proj),
            BT=tiles.frames, BR=tiles.ranks, BC=tiles.columns, **options, **_split_options(),
        ),
        tiles.warps,
        tiles.stages,
    )  # fmt: skip
    out = empty((batch, heads, rank, headdim), x, _math(x))
    _sum(parts, out, seq_lens, frames, normalize)
    return out


def _head_strides(proj) -> dict:
    strides = _strides("p", proj, "htr")
    return {**strides, "p_h": 0} if proj.shape[0] == 1 else strides


@replayed(_settings)
def linformer_project_backward(grad, x, proj, normalize, seq_lens):
    """``linconv::linformer_project_backward_triton``."""
    batch, heads, frames, headdim = x.shape
    proj_heads, most, rank = proj.shape
    operand, options = _options(x)
    tiles = _tiles(x, operand, options)
    dx, dproj = _empty_frames(x), empty(proj.shape, proj, proj.dtype)
    blocks = triton.cdiv(headdim, tiles.columns)
    common = dict(
        grad=grad, bounds=seq_lens, frames=frames, heads=heads, rank=rank, headdim=headdim,
        **_strides("g", grad, "bhrc"), NORMALIZE=normalize, BT=tiles.frames, BR=tiles.ranks, BC=tiles.columns,
        **options,
    )  # fmt: skip
    launch(
        kernels.unproject,
        (triton.cdiv(frames, tiles.frames) * batch * heads, blocks),
        dict(proj=proj, dx=dx, **common, **_head_strides(proj), **_strides("d", dx, "bhtc")),
        tiles.warps,
        tiles.stages,
    )
    launch(
        kernels.project_weights,
        (triton.cdiv(most, tiles.frames), triton.cdiv(rank, tiles.ranks), proj_heads),
        dict(
            x=x,
            dproj=dproj,
            batch=batch,
            most=most,
            shared_heads=heads if proj_heads == 1 else 1,
            **common,
            **_strides("x", x, "bhtc"),
            **_strides("d", dproj, "htr"),
        ),
        tiles.warps,
        tiles.stages,
    )
    return dx, dproj


def _attention(q, k, v, scale, dropout_p, seed, seq_lens):
    operand, options = _options(q)

    def number(x):
        return bits_of(x) if options["MATH"] == tl.float64 else x

    common = dict(
        q=q, k=k, v=v, bounds=seq_lens, seed=seed, frames=q.shape[2], heads=q.shape[1], rank=k.shape[2],
        headdim=q.shape[3], scale=number(scale), threshold=min(round(dropout_p * 2**32), 2**32 - 1),
        keep_scale=number(1 / (1 - dropout_p)), **_strides("q", q, "bhtc"), **_strides("k", k, "bhrc"),
        **_strides("v", v, "bhrc"), BD=_power(q.shape[3]), **options,
    )  # fmt: skip
    return common, _tiles(q, operand, options)


@replayed(_settings)
def linformer_attend(q, k, v, scale, dropout_p, seed, seq_lens):
    """``linconv::linformer_attend_triton``."""
    common, tiles = _attention(q, k, v, scale, dropout_p, seed, seq_lens)
    out = _empty_frames(q)
    launch(
        kernels.attend,
        (triton.cdiv(q.shape[2], tiles.frames) * q.shape[0] * q.shape[1],),
        dict(out=out, **common, **_strides("o", out, "bhtc"), BT=tiles.frames, BR=tiles.ranks),
        tiles.warps,
        tiles.stages,
    )
    return out


@replayed(_settings)
def linformer_attend_backward(grad, q, k, v, scale, dropout_p, seed, seq_lens):
    """``linconv::linformer_attend_backward_triton``."""
    batch, heads, frames, headdim = q.shape
    rank, splits = k.shape[2], _splits(frames)
    common, tiles = _attention(q, k, v, scale, dropout_p, seed, seq_lens)
    common |= dict(
        grad=grad, **_strides("g", grad, "bhtc"), BT=tiles.gradient_frames, BR=tiles.gradient_ranks,
    )  # fmt: skip
    dq = _empty_frames(q)
    # Of each query: the logarithm of its weights' normaliser, and the mean gradient of its scores.
    normalisers, means = (empty((batch, heads, frames), q, _math(q)) for _ in range(2))
    common |= dict(normalisers=normalisers, means=means)
    launch(
        kernels.attend_queries,
        (triton.cdiv(frames, tiles.gradient_frames) * batch * heads,),
        dict(dq=dq, **common, **_strides("o", dq, "bhtc")),
        tiles.gradient_warps,
        tiles.stages,
    )
    dk_parts, dv_parts = (empty((batch, heads, splits, rank, headdim), q, _math(q)) for _ in range(2))
    launch(
        kernels.attend_keys,
        (batch * heads, triton.cdiv(rank, tiles.key_ranks), splits),
        dict(common, dk_parts=dk_parts, dv_parts=dv_parts, splits=splits, BR=tiles.key_ranks, **_split_options()),
        tiles.gradient_warps,
        tiles.stages,
        **(ALL_REGISTERS if headdim > 128 else {}),
    )
    dk, dv = (empty(t.shape, t, t.dtype) for t in (k, v))
    _sum(dk_parts, dk, seq_lens, frames, False)
    _sum(dv_parts, dv, seq_lens, frames, False)
    return dq, dk, dv


def shipped(capability: int = 90):
    """The builds for a compute capability and the usual sizes: heads of 64, 128 and 256, with dropout and lengths."""
    before = torch.get_float32_matmul_precision()
    found = []
    try:
        for dtype, precision in SHIPPED:
            torch.set_float32_matmul_precision(precision)
            for headdim in (64, 128, 256):
                if precision != "high" or headdim <= MOST_HEADDIM_OF_THREE:
                    found += _builds(dtype, headdim, capability)
    finally:
        torch.set_float32_matmul_precision(before)
    return found


SHIPPED = (
    (torch.bfloat16, "highest"),
    (torch.float16, "highest"),
    *((torch.float32, precision) for precision in ("highest", "high", "medium")),
)


def _builds(dtype: torch.dtype, headdim: int, capability: int) -> list:
    frames, rank = 4096, 256
    q = torch.empty(2, frames, 4, headdim, dtype=dtype, device="meta").transpose(1, 2)
    proj = torch.empty(1, frames, rank, dtype=dtype, device="meta")
    k = torch.empty(2, 4, rank, headdim, dtype=torch.float32, device="meta")
    lengths = torch.empty(2, dtype=torch.int64, device="meta")
    seed = torch.empty((), dtype=torch.int64, device="meta")
    precision = torch.get_float32_matmul_precision()
    label = f"{str(dtype)[6:]}{f' ({PRECISIONS[precision]})' if precision != 'highest' else ''}, headdim {headdim}"
    calls = (
        (linformer_project, (q, proj, True, lengths)),
        (linformer_project_backward, (k, q, proj, True, lengths)),
        (linformer_attend, (q, k, k, 0.125, 0.1, seed, lengths)),
        (linformer_attend_backward, (q, q, k, k, 0.125, 0.1, seed, lengths)),
    )
    return [
        b for function, arguments in calls for b in launched(functools.partial(function, *arguments), label, capability)
    ]
