"""The distillation losses on Triton kernels: which tiles, which memory, which launches.

Hidden states are one launch for each pair of dtypes that the two sides have, whatever the layers' number, widths and
strides, and two for the sums; logits are one, and one for theirs; backward is one each. A layer's pointers travel in
the launch itself: no table is copied to the device, nothing is read back to the host, so a CUDA graph can hold it all.
"""

from dataclasses import dataclass
from itertools import groupby

import torch
import triton

from linconv.ops.distillation_loss import triton_kernels as kernels
from linconv.ops.triton_launch import MATH, empty, launch, launched
from linconv.ops.triton_numbers import bits_of

STATISTICS = 6  # numbers of a row of logits
PARAMETER_BYTES = 3072  # that layers may take of the 4 KiB of a launch
OPTIONS = {"enable_fp_fusion": False}  # see triton_kernels.py


@dataclass(frozen=True)
class Tile:
    """`rows` by `columns` in one step of a program. No field depends on batch or length, which would change bits."""

    rows: int
    columns: int
    warps: int


def choose_tile(width: int, math: torch.dtype, held: bool, gradient: bool = False) -> Tile:
    """The committed table, of every GPU. In bfloat16 on an H200 it is the fastest of what benchmarks/tune_gpu_tiles.py
    tries: a thread has 32 elements of a side where a row is held, else 16, and 8 for the gradients of logits.

    Args:
        width: elements of a row.
        math: what is computed in.
        held: whether a row is to be held in registers, up to 16,384 elements in float32; longer ones are read again,
            out of the L2 cache.
        gradient: of logits.
    """
    size = 2048 // (2 if math == torch.float64 else 1)  # elements of a tile of short rows
    of_a_warp = size // 2 if held else size // 8 if gradient else size // 4
    most = 8 * size if held else size // 2 if gradient else size
    columns = min(triton.next_power_of_2(width), most)
    rows = min(32, max(1, min(size, most) // columns))  # of 64 rows of logits, what is kept of each spills
    return Tile(rows, columns, min(16, max(2 if held else 4, rows * columns // of_a_warp)))


def _math(*tensors: torch.Tensor | None) -> torch.dtype:
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def _strides(name: str, tensor: torch.Tensor) -> dict:
    return {f"{name}_{axis}": stride for axis, stride in zip("btc", tensor.stride())}


def _mask(mask: torch.Tensor | None) -> dict:
    """A mask (batch, L), as bytes, or lengths (batch,), as kernels are told of them."""
    if mask is None:
        return dict(mask=None, m_b=0, m_t=0)
    strides = (*mask.stride(), 0)
    return dict(mask=mask.view(torch.uint8) if mask.dtype == torch.bool else mask, m_b=strides[0], m_t=strides[1])


def _counted(mask: torch.Tensor | None, frames: int) -> torch.Tensor | None:
    """How many rows count, on the device; None where all do."""
    if mask is None:
        return None
    return (mask if mask.dtype == torch.bool else mask.clamp(0, frames)).sum(dtype=torch.int64)


def _mean_over_rows(parts: torch.Tensor, out: torch.Tensor, counted: torch.Tensor | None, rows: int) -> None:
    """out (values,) = sums of parts (values, batch, blocks) over how many rows count."""
    values, batch, blocks = parts.shape
    tile = min(16, triton.next_power_of_2(max(batch, 1)))
    launch(
        kernels.mean_over_rows,
        (values,),
        dict(
            parts=parts, out=out, counted=counted, rows=rows, batch=batch, blocks=blocks,
            **dict(zip(("p_v", "p_b", "p_k"), parts.stride())), BATCH=tile, BLOCKS=2048 // tile,
        ),
        4,
    )  # fmt: skip


# ---- Hidden states


def _shared(values) -> tuple:
    """One of the values where all are equal: a kernel that knows a stride to be 1 reads in larger pieces."""
    values = tuple(values)
    return values[:1] if len(set(values)) == 1 else values


def _launch_layers(kernel, student, teacher, gradients, layer_norm, arguments) -> None:
    """Runs a kernel of hidden states on all layers.

    Args:
        gradients: name: one for each layer, for what the kernel writes; empty lists where not wanted.
    """
    math = _math(*student, *teacher)
    batch, frames = student[0].shape[:2]
    widest = max(s.shape[2] for s in student)
    tile, blocks = _layer_tile(student, teacher)
    by_dtype = sorted(range(len(student)), key=lambda i: (str(student[i].dtype), str(teacher[i].dtype)))
    for _, group in groupby(by_dtype, key=lambda i: (student[i].dtype, teacher[i].dtype)):
        group = list(group)
        pointers = 2 + sum(bool(g) for g in gradients.values())
        while group:
            many = PARAMETER_BYTES // (8 * pointers)
            values = _layer_values(student, teacher, group[:many])
            if 8 * sum(map(len, values.values())) + 8 * pointers * len(group[:many]) > PARAMETER_BYTES:
                many = PARAMETER_BYTES // (8 * (pointers + len(values)))
                values = _layer_values(student, teacher, group[:many])
            chosen, group = group[:many], group[many:]
            launch(
                kernel,
                (batch * blocks, len(chosen)),
                dict(
                    student=tuple(student[i] for i in chosen), teacher=tuple(teacher[i] for i in chosen),
                    **{name: tuple(g[i] for i in chosen) if g else None for name, g in gradients.items()},
                    **values, **arguments, frames=frames, blocks=blocks,
                    NORM=layer_norm, BR=tile.rows, BD=tile.columns, STEPS=triton.cdiv(widest, tile.columns),
                    MATH=MATH[math],
                ),
                tile.warps,
                **OPTIONS,
            )  # fmt: skip


def _layer_tile(student, teacher) -> tuple[Tile, int]:
    """The tile of all layers, and how many of them a sequence's frames take."""
    tile = choose_tile(max(s.shape[2] for s in student), _math(*student, *teacher), held=True)
    return tile, triton.cdiv(student[0].shape[1], tile.rows)


def _layer_values(student, teacher, chosen) -> dict:
    sides = {"s": student, "t": teacher}
    strides = {
        f"{n}_{a}": _shared(x[i].stride(k) for i in chosen) for n, x in sides.items() for k, a in enumerate("btc")
    }
    widths = _shared(student[i].shape[2] for i in chosen)
    return dict(widths=widths, **strides, offsets=_shared(layer - i for i, layer in enumerate(chosen)))


def _layers_forward(student, teacher, mask, layer_norm) -> tuple[torch.Tensor, torch.Tensor]:
    math = _math(*student, *teacher)
    batch, frames = student[0].shape[:2]
    _, blocks = _layer_tile(student, teacher)
    parts = empty((2, len(student), batch, blocks), student[0], torch.float64)
    arguments = dict(**_mask(mask), parts=parts, layers=len(student), batch=batch)
    _launch_layers(kernels.layers_forward, student, teacher, {}, layer_norm, arguments)
    errors, cosines = (empty((len(student),), student[0], math) for _ in range(2))
    counted = _counted(mask, frames)
    for part, out in zip(parts, (errors, cosines)):
        _mean_over_rows(part, out, counted, batch * frames)
    return errors, cosines


# ---- Logits


def _launch_logits(kernel, student, teacher, mask, temperature, columns: bool, arguments: dict) -> None:
    batch, frames, classes = student.shape
    math = _math(student, teacher)
    tile = choose_tile(classes, math, held=False, gradient=columns)
    grid = triton.cdiv(batch * frames, tile.rows), triton.cdiv(classes, tile.columns) if columns else 1
    launch(
        kernel,
        grid,
        dict(
            student=student, teacher=teacher, **_strides("s", student), **_strides("t", teacher), **_mask(mask),
            **arguments, inverse_bits=bits_of(1 / temperature), rows=batch * frames, frames=frames, classes=classes,
            BR=tile.rows, BV=tile.columns, MATH=MATH[math],
        ),
        tile.warps,
        **OPTIONS,
    )  # fmt: skip


def _logits_forward(student, teacher, mask, before, temperature) -> torch.Tensor:
    statistics = empty((student.shape[0] * student.shape[1], STATISTICS), student, torch.float64)
    arguments = dict(before=before, statistics=statistics)
    _launch_logits(kernels.logits_forward, student, teacher, mask, temperature, False, arguments)
    return statistics


def _logits_backward(
    student, teacher, mask, temperature, statistics, upstream, stride, counted, counting, of_student, of_teacher
) -> tuple[torch.Tensor, torch.Tensor]:
    ds, dt = (_gradient(x, wanted) for x, wanted in ((student, of_student), (teacher, of_teacher)))
    arguments = dict(
        ds=ds if of_student else None, dt=dt if of_teacher else None, statistics=statistics, upstream=upstream,
        u_r=stride, counted=counted, counting=counting,
    )  # fmt: skip
    _launch_logits(kernels.logits_backward, student, teacher, mask, temperature, True, arguments)
    return ds, dt


# ---- The operators


def _gradient(x: torch.Tensor | None, wanted: bool) -> torch.Tensor:
    return empty(x.shape if wanted else (0,), x, x.dtype)


def distillation_loss(student, teacher, mask, layer_norm, student_logits, teacher_logits, logits_mask, temperature):
    """``linconv::distillation_loss_triton``."""
    like = student[0] if student else student_logits
    if student:
        errors, cosines = _layers_forward(student, teacher, mask, layer_norm)
    else:
        errors, cosines = (empty((0,), like, torch.float32) for _ in range(2))
    if student_logits is None:
        return errors, cosines, torch.zeros(1, device=like.device), empty((0, STATISTICS), like, torch.float64)
    statistics = _logits_forward(student_logits, teacher_logits, logits_mask, None, temperature)
    batch, frames = student_logits.shape[:2]
    kd = empty((1,), like, _math(student_logits, teacher_logits))
    kl = statistics.view(1, batch, frames, STATISTICS)[..., -1]
    _mean_over_rows(kl, kd, _counted(logits_mask, frames), batch * frames)
    return errors, cosines, kd, statistics


def distillation_loss_backward(
    grad_errors, grad_kd, student, teacher, mask, layer_norm, student_logits, teacher_logits, logits_mask, temperature,
    statistics, of_student, of_teacher, of_student_logits, of_teacher_logits,
):  # fmt: skip
    """``linconv::distillation_loss_backward_triton``."""
    ds = [_gradient(x, of_student) for x in student]
    dt = [_gradient(x, of_teacher) for x in teacher]
    if student and (of_student or of_teacher):
        batch, frames = student[0].shape[:2]
        arguments = dict(
            **_mask(mask), upstream=grad_errors, u_l=grad_errors.stride(0), counted=_counted(mask, frames),
            rows=batch * frames,
        )  # fmt: skip
        _launch_layers(
            kernels.layers_backward,
            student,
            teacher,
            {"ds": ds if of_student else [], "dt": dt if of_teacher else []},
            layer_norm,
            arguments,
        )
    of_logits = [torch.empty(0, device=grad_errors.device) for _ in range(2)]
    if student_logits is not None:
        batch, frames = student_logits.shape[:2]
        wanted = of_student_logits, of_teacher_logits
        if any(wanted):
            of_logits = _logits_backward(
                student_logits, teacher_logits, logits_mask, temperature, statistics, grad_kd, 0,
                _counted(logits_mask, frames), batch * frames, *wanted,
            )  # fmt: skip
        else:
            of_logits = [_gradient(x, False) for x in (student_logits, teacher_logits)]
    return ds, dt, *of_logits


def kd_statistics(student, teacher, before, temperature):
    """``linconv::kd_statistics_triton``."""
    before = None if before is None else before.contiguous()
    return _logits_forward(student[None], teacher[None], None, before, temperature)


def kd_gradient(student, teacher, statistics, scale, temperature):
    """``linconv::kd_gradient_triton``."""
    known = statistics.contiguous()
    return _logits_backward(
        student[None], teacher[None], None, temperature, known, scale, scale.stride(0), None, 1, True, False
    )[0][0]


def shipped():
    """The builds for the usual sizes: 24 layers under a mask, outputs of a CTC head and of a language model."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for norm, width in ((True, 768), (True, 1024), (False, 1024)):
            states = [torch.empty(8, 1500, width, dtype=dtype, device="meta") for _ in range(24)]
            mask = torch.empty(8, 1500, dtype=torch.bool, device="meta")
            errors = torch.empty(24, device="meta")

            def layers(states=states, mask=mask, norm=norm, errors=errors):
                distillation_loss(states, states, mask, norm, None, None, None, 2.0)
                distillation_loss_backward(
                    errors,
                    errors[:1],
                    states,
                    states,
                    mask,
                    norm,
                    None,
                    None,
                    None,
                    2.0,
                    errors,
                    True,
                    False,
                    False,
                    False,
                )

            yield from launched(layers, f"{dtype} width {width}{' layer norm' if norm else ''}".removeprefix("torch."))
        for classes in (32, 50_257):
            logits = torch.empty(8, 1500, classes, dtype=dtype, device="meta")
            lengths = torch.empty(8, dtype=torch.int64, device="meta")
            one = torch.empty(1, device="meta")

            def outputs(logits=logits, lengths=lengths, one=one):
                *_, statistics = distillation_loss([], [], None, False, logits, logits, lengths, 2.0)
                distillation_loss_backward(
                    one, one, [], [], None, False, logits, logits, lengths, 2.0, statistics, False, False, True, False
                )

            yield from launched(outputs, f"{dtype} classes {classes}".removeprefix("torch."))
