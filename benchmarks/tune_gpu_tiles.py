"""Times the Triton kernels of the other operators at many tiles: what their modules' `choose_tile` is set by.

    python benchmarks/tune_gpu_tiles.py --out benchmarks/results/<gpu>/tiles_of_operators.json [--only short_conv ...]

Each candidate differs from the committed tile in some fields, of the forward or of the backward pass. All are compiled
first, in as many processes as there are cores. Times are of all kernels of a call, by CUPTI. Candidates whose results
differ from the committed tile's by more than the order of sums explains are told, not timed.
"""

import argparse
import contextlib
import importlib
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from tune_gpu_scan import flat, kernel_times, of, usable

from linconv import ops
from linconv.benchmarking.record import Record

BATCH, FRAMES = 8, 1499
VOCABULARY, LAYERS = 50_257, 24


def tensor(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def slices_of_rows(directions, channels, row):
    """(directions, batch, L, channels) out of the rows of a projection, as mixers have them."""
    return tensor(BATCH, FRAMES, directions, row).movedim(2, 0)[..., :channels]


def short_conv(directions, channels, row, width, lookahead):
    weight, bias = (tensor(directions, channels, *rest, dtype=torch.float32) for rest in ((width,), ()))
    return slices_of_rows(directions, channels, row), weight, bias, True, False, lookahead, None, None


def gated_rms_norm(directions, channels, row):
    x, z = tensor(directions, BATCH, FRAMES, channels), slices_of_rows(directions, channels, row)
    return x, z, tensor(directions, channels, dtype=torch.float32), 1e-5, channels, None


def selective_scan(channels, dstate):
    x, dt, z = (tensor(BATCH, FRAMES, channels) for _ in range(3))
    A, D, bias = -torch.rand(channels, dstate, device="cuda") - 0.1, tensor(channels).float(), tensor(channels).float()
    B, C = tensor(BATCH, FRAMES, 1, dstate), tensor(BATCH, FRAMES, 1, dstate)
    return x, dt, A, B, C, D, z, bias, True, None, None, None, False


def conv_tiles(*tiles):
    return [dict(zip(("slices", "channels", "steps", "group", "warps"), values)) for values in tiles]


CONV = conv_tiles(
    (4, 128, 32, 8, 4), (4, 128, 64, 4, 4), (4, 128, 16, 4, 4), (4, 256, 32, 4, 8), (4, 256, 32, 4, 4),
    (8, 128, 32, 4, 8), (8, 128, 32, 4, 4), (2, 128, 32, 4, 2), (2, 256, 32, 4, 4), (8, 64, 32, 4, 4),
    (2, 256, 32, 8, 4), (8, 256, 32, 4, 8), (2, 128, 64, 8, 2), (1, 256, 32, 8, 4),
)  # fmt: skip
CONV_GRADIENT = conv_tiles(
    (4, 128, 32, 2, 4), (4, 64, 32, 2, 4), (4, 64, 32, 4, 4), (8, 64, 32, 2, 4), (8, 64, 64, 2, 4), (4, 128, 64, 2, 4),
    (2, 128, 32, 4, 4), (2, 128, 64, 4, 4), (2, 64, 32, 4, 2), (2, 128, 32, 2, 2), (4, 128, 32, 2, 8),
    (8, 128, 32, 2, 8), (4, 64, 64, 4, 4), (2, 64, 64, 4, 2),
)  # fmt: skip
NORM = of(rows=[1, 2, 4], warps=[2, 4, 8])
# (operator, what it is called with, arguments of that, candidates of forward, of backward).
OPERATORS = (
    ("short_conv", "BiMamba2", short_conv, (2, 1280, 2320, 4, 0), CONV, CONV_GRADIENT),
    ("short_conv", "Hydra", short_conv, (1, 1536, 2592, 7, 3), CONV, CONV_GRADIENT),
    ("gated_rms_norm", "BiMamba2", gated_rms_norm, (2, 1024, 2320), NORM, NORM),
    ("gated_rms_norm", "Hydra", gated_rms_norm, (1, 1024, 2592), NORM, NORM),
    ("selective_scan", "Mamba", selective_scan, (1536, 16),
     of(steps=[2, 4, 8], warps=[1, 2]) + of(chunk=[32, 128]) + of(channels=[16, 64], warps=[1, 2]),
     of(gradient_steps=[2, 4, 8], gradient_warps=[2, 4, 8]) + of(gradient_channels=[16, 64], gradient_warps=[4, 8])
     + of(gradient_chunk=[16, 32])),
)  # fmt: skip
LOGITS = of(rows=[1], columns=[1024, 2048, 4096, 8192], warps=[4, 8, 16]) + of(rows=[2], columns=[2048], warps=[4, 8])
STATES = of(rows=[1, 2, 4, 8], warps=[2, 4, 8])


@contextlib.contextmanager
def tiles(operator, fields, gradient):
    """In which an operator's module chooses tiles with these fields."""
    module = importlib.import_module(f"linconv.ops.{operator}.triton")
    name = "choose_tiles" if operator == "selective_scan" else "choose_tile"
    chosen = getattr(module, name)

    def choose(*arguments, **keywords):
        tile = chosen(*arguments, **keywords)
        if operator != "selective_scan" and "gradient" in keywords and keywords["gradient"] != gradient:
            return tile
        return replace(tile, **{n: v for n, v in fields.items() if hasattr(tile, n)})

    with mock.patch.object(module, name, choose):
        if operator == "short_conv" and "warps" in fields:
            with mock.patch.object(module, "WARPS", fields["warps"]):
                yield module
        else:
            yield module


def kd_loss():
    student, teacher = tensor(1, 4096, VOCABULARY).requires_grad_(), tensor(1, 4096, VOCABULARY)

    def work():
        loss = ops.kd_loss(student, teacher, backend="triton")
        return loss, *torch.autograd.grad(loss, student)

    return work


def layerwise_mse():
    students, teachers = ([tensor(BATCH, FRAMES, 1024) for _ in range(LAYERS)] for _ in range(2))
    for student in students:
        student.requires_grad_()

    def work():
        loss = ops.layerwise_mse(students, teachers, layer_norm=True, backend="triton")
        return loss, *torch.autograd.grad(loss, students)

    return work


LOSSES = {"logits": (kd_loss, LOGITS), "hidden states": (layerwise_mse, STATES)}


def candidates(only):
    for operator, label, _, _, forward, backward in OPERATORS:
        if operator in only:
            for gradient, fields in ((False, forward), (True, backward)):
                yield from ((operator, label, gradient, f) for f in ({}, *fields))
    if "distillation_loss" in only:
        for label, (_, fields) in LOSSES.items():
            yield from (("distillation_loss", label, True, f) for f in ({}, *fields))


def work_of(operator, label, gradient):
    """Does the work of a candidate, however often it was done before."""
    torch.manual_seed(0)
    if operator == "distillation_loss":
        return LOSSES[label][0]()
    make, arguments = next(o[2:4] for o in OPERATORS if o[:2] == (operator, label))
    given = make(*arguments)
    module = importlib.import_module(f"linconv.ops.{operator}.triton")
    run = getattr(module, operator + ("_backward" if gradient else "")).__wrapped__
    if not gradient:
        return lambda: run(*given)
    upstream = torch.randn_like(given[0])
    return lambda: run(upstream, None, *given) if operator == "selective_scan" else run(upstream, *given)


def compile(operator, label, gradient, fields):
    """Leaves what a candidate launches in Triton's cache on disk; an error's text where it does not run."""
    try:
        with tiles(operator, fields, gradient):
            work_of(operator, label, gradient)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*dict.fromkeys(o[0] for o in OPERATORS), "distillation_loss"]
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which nothing more is compiled")
    options = parser.parse_args()
    record = Record("tiles", path=options.out)
    last = None
    for operator, label, gradient, fields in usable(compile, list(candidates(options.only)), options.limit):
        if last != (operator, label, gradient):
            last = operator, label, gradient
            work = work_of(*last)
            committed = [flat((r,)) for r in outputs(work())]
        with tiles(operator, fields, gradient):
            found = [flat((r,)) for r in outputs(work())]
            off = max(((a - b).norm() / b.norm().clamp(1e-30)).item() for a, b in zip(found, committed) if b.numel())
            del found
            if not off < 0.01:
                print(*last, fields, f"is off by {off:.2g}")
                continue
            times = kernel_times(work)
        record.add(
            operator=operator, form=label, work="backward" if gradient else "forward", **fields,
            seconds=sum(times.values()), **{f"{n[:40]} seconds": t for n, t in times.items() if t > 5e-6},
        )  # fmt: skip


def outputs(results):
    return [r for r in (results if isinstance(results, tuple) else (results,)) if isinstance(r, torch.Tensor)]


if __name__ == "__main__":
    main()
