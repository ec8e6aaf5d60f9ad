"""Distillation losses on CPU, forward and backward, against their floor in bytes and against plain torch, in one run.

    python benchmarks/bench_distillation_loss.py --out benchmarks/results/cpu/distillation_loss.json

Shape: 24 layers of (1, L, 1024), as a large speech encoder has; logits of 32 classes (CTC) and 50,257. The floor is
bytes (forward reads both sides, backward reads both and writes one gradient: 5 sizes of one side) over the rate at
which torch copies one side to another place, layer by layer, timed in turn with the kernel. Gradients are new tensors
at every call. The floor of linear_kd_loss is the operations of four products over the rate of a large torch.mm.
"""

import functools

import torch

from linconv import ops
from linconv.benchmarking import compare, peak_extra_bytes
from linconv.benchmarking.machine import matmul_work
from linconv.benchmarking.record import run
from linconv.benchmarking.suites.loss import LAYERS, WIDTH, kl_in_torch, mse_in_torch
from linconv.ops.distillation_loss.linear import TILE_OF_CPU

plain_mse = functools.partial(mse_in_torch, layer_norm=False)


def kl_of_logits_in_torch(hidden_s, weight_s, hidden_t, weight_t):
    return kl_in_torch((hidden_s @ weight_s.T)[None], (hidden_t @ weight_t.T)[None])


def training(loss, student, *rest):
    """Forward and backward, as a callable; ``student`` is a tensor or a list of them."""
    leaves = student if isinstance(student, list) else [student]

    def step():
        return torch.autograd.grad(loss(student, *rest), leaves)

    return step


def check(dtype):
    """The kernels' errors are at most twice plain torch's, three times for gradients: root mean squares over draws.

    In a single draw, torch's error of a loss, which is one number, may be almost zero.
    """
    mask = torch.arange(50) < torch.tensor([50, 31])[:, None]
    cases = {
        "mse": (lambda s, t: ops.layerwise_mse(s, t), plain_mse),
        "mse with layer norm and mask": (
            lambda s, t: ops.layerwise_mse(s, t, mask=mask, layer_norm=True),
            lambda s, t: mse_in_torch(s, t, mask=mask),
        ),
        "kl": (lambda s, t: ops.kd_loss(s[0], t[0]), lambda s, t: kl_in_torch(s[0], t[0])),
        "kl from hidden states": tuple(
            lambda s, t, loss=loss: loss(*(x.flatten(0, 1) / x.shape[-1] ** 0.25 for x in (*s, *t)))
            for loss in (ops.linear_kd_loss, kl_of_logits_in_torch)
        ),
    }
    for name, (ours, theirs) in cases.items():
        found = []
        for _ in range(16):
            student, teacher = ([torch.randn(2, 50, 512).to(dtype) for _ in range(2)] for _ in range(2))
            for loss, kind in ((theirs, torch.float64), (theirs, dtype), (ours, dtype)):
                s, t = ([x.to(kind).clone().requires_grad_() for x in side] for side in (student, teacher))
                value = loss(s, t)
                found.append((value.double(), torch.autograd.grad(value, s, allow_unused=True)[0].double()))
        for factor, values in zip((2, 3), zip(*found)):
            exact, torchs, got = (torch.stack(values[i::3]) for i in range(3))
            allowed = factor * (torchs - exact).norm() + 1e-8 * exact.norm()
            if not (got - exact).norm() <= allowed:
                raise SystemExit(f"{name}, {dtype}: error above {allowed:.2e}; no speed is reported")


def hidden_states(length, dtype, grad):
    return [torch.randn(1, length, WIDTH).to(dtype).requires_grad_(grad) for _ in range(LAYERS)]


def add(record, common, seconds, ours, peer, floor):
    """One row: a kernel against its floor and against a peer."""
    record.add(
        **common,
        seconds=seconds[ours],
        floor_seconds=floor,
        over_floor=seconds[ours] / floor,
        peer=peer,
        peer_seconds=seconds[peer],
        speedup=seconds[peer] / seconds[ours],
    )


def layers(record, length, dtype):
    student, teacher = hidden_states(length, dtype, True), hidden_states(length, dtype, False)
    target = [torch.empty_like(t) for t in teacher]
    mask = torch.ones(1, length, dtype=torch.bool)
    works = {
        "copy": lambda: [a.copy_(b) for a, b in zip(target, teacher)],
        "layerwise_mse": training(ops.layerwise_mse, student, teacher),
        "layerwise_mse, layer norm and mask": training(
            lambda s, t: ops.layerwise_mse(s, t, mask=mask, layer_norm=True), student, teacher
        ),
        "F.mse_loss a layer": training(plain_mse, student, teacher),
        "F.layer_norm, mask, mean": training(functools.partial(mse_in_torch, mask=mask), student, teacher),
    }
    taken = compare(works, min_repeats=5, min_seconds=1.0)
    seconds = {name: latency.median for name, latency in taken.items()}
    common = dict(length=length, layers=LAYERS, d=WIDTH, dtype=str(dtype)[6:])
    floor = 2.5 * seconds["copy"]  # a copy reads one size and writes one
    add(record, {"op": "layerwise_mse", **common}, seconds, "layerwise_mse", "F.mse_loss a layer", floor)
    ours, peer = "layerwise_mse, layer norm and mask", "F.layer_norm, mask, mean"
    add(record, {"op": ours, **common}, seconds, ours, peer, floor)


def logits(record, rows, classes):
    student, teacher = torch.randn(1, rows, classes, requires_grad=True), torch.randn(1, rows, classes)
    target = torch.empty_like(teacher)
    works = {
        "copy": lambda: target.copy_(teacher),
        "kd_loss": training(ops.kd_loss, student, teacher),
        "log_softmax and F.kl_div": training(kl_in_torch, student, teacher),
    }
    taken = compare(works, min_repeats=5, min_seconds=0.5)
    seconds = {name: latency.median for name, latency in taken.items()}
    common = dict(op="kd_loss", length=rows, classes=classes, dtype="float32")
    add(record, common, seconds, "kd_loss", "log_softmax and F.kl_div", 2.5 * seconds["copy"])


def from_hidden(record, rows, d, classes, dtype):
    """The losses that compute logits; the peer uses torch's products for all of them at once."""
    inputs = [torch.randn(n, d).to(dtype) / d**0.5 for n in 2 * (rows, classes)]
    mm, flops = matmul_work(dtype=dtype)
    works = {"mm": mm}
    for name, loss in (("linear_kd_loss", ops.linear_kd_loss), ("all logits", kl_of_logits_in_torch)):
        students = [t.clone().requires_grad_() for t in inputs[:2]]
        works[name] = lambda loss=loss, students=students: torch.autograd.grad(loss(*students, *inputs[2:]), students)
    taken = compare(works, min_repeats=5, min_seconds=2.0)
    seconds = {name: latency.median for name, latency in taken.items()}
    common = dict(op="linear_kd_loss", length=rows, d=d, classes=classes, dtype=str(dtype)[6:])
    floor = 4 * 2 * rows * d * classes * seconds["mm"] / flops  # one product per side and one per gradient
    add(record, common, seconds, "linear_kd_loss", "all logits", floor)


def linear(rows, d, classes, dtype):
    """Builds the inputs and returns the loss with both gradients as the work, for measuring memory."""
    hidden, weight, *teacher = (torch.randn(n, d).to(dtype) for n in 2 * (rows, classes))
    hidden.requires_grad_(), weight.requires_grad_()

    def work(rows=rows, classes=classes):
        students, teachers = (hidden[:rows], weight[:classes]), (teacher[0][:rows], teacher[1][:classes])
        return torch.autograd.grad(ops.linear_kd_loss(*students, *teachers), students)

    work(*TILE_OF_CPU)  # loads the code of the matrix products, which is not counted
    return work


def memory(record, rows, d, classes, dtype):
    """Peak memory of the loss and its two gradients; logits in full would be 2 * 4 * rows * classes bytes alone."""
    gradients = dtype.itemsize * d * (rows + classes)
    peak = peak_extra_bytes(linear, rows, d, classes, dtype, preload=("torch", "linconv.ops"))
    common = dict(op="linear_kd_loss", length=rows, d=d, classes=classes, dtype=str(dtype)[6:], peak_bytes=peak)
    record.add(**common, peak_bytes_beside_gradients=peak - gradients, bytes_of_logits=8 * rows * classes)


def body(record, lengths):
    for dtype in (torch.float32, torch.bfloat16):
        check(dtype)
    for length in lengths:
        for dtype in (torch.float32, torch.bfloat16):
            layers(record, length, dtype)
    logits(record, lengths[0], 32)
    logits(record, 512, 50_257)
    for dtype in (torch.float32, torch.bfloat16):
        from_hidden(record, 512, 768, 50_257, dtype)
    for d, dtype in ((256, torch.float32), (1024, torch.float32), (1024, torch.bfloat16)):
        memory(record, 8_192, d, 50_257, dtype)


if __name__ == "__main__":
    run("distillation_loss", __doc__.splitlines()[0], [1_499], body)
