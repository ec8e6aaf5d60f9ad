"""Linformer attention against exact attention, and against its own formula in plain torch."""

import functools

import torch

from linconv import ops
from linconv.benchmarking.suite import TOKEN_LENGTHS, Case, Cost, Implementation, Setting, judge
from linconv.benchmarking.suites import peers
from linconv.benchmarking.suites.backends import by_backend

HEADS, HEADDIM, RANK = 12, 64, 256


def inputs(setting, length):
    """q, k, v and the projection that keys and values share."""
    shape = (setting.batch, HEADS, length, HEADDIM)
    return [*(setting.tensor(*shape) for _ in range(3)), setting.tensor(length, RANK)]


def ours(q, k, v, proj, backend=None):
    return ops.linformer_attention(q, k, v, proj, backend=backend)


def in_torch(q, k, v, proj_k, proj_v=None):
    pairs = (proj_k, k), (proj_k if proj_v is None else proj_v, v)
    keys, values = (proj.mT @ x * x.shape[2] ** -0.5 for proj, x in pairs)  # (batch, heads, rank, headdim)
    return peers.eager(q, keys, values)


def run(setting, length, function):
    tensors = inputs(setting, length)
    return functools.partial(function, *tensors), tensors


def check(function, setting):
    judge(function, in_torch, in_torch, inputs(setting, 300))


def cost(setting, length):
    """Two projections and two products with r keys; backward twice as many and the scores again.

    Forward reads q, k and v and writes the result; backward also reads dy, and writes a gradient of each of the three.
    """
    products = 4 if setting.work == "forward" else 13
    flops = products * 2 * setting.batch * HEADS * HEADDIM * RANK * length
    size = torch.finfo(setting.torch_dtype).bits // 8
    tensors = 4 if setting.work == "forward" else 4 + 7
    return Cost(flops, tensors * size * setting.batch * HEADS * HEADDIM * length, setting.arithmetic)


def cases(device):
    implementations = [
        *(
            Implementation(name, run, (function,), ours=True, check=functools.partial(check, function), cost=cost)
            for name, function in by_backend(ours, device)
        ),
        Implementation("the formula in plain torch", run, (in_torch,)),
    ]
    implementations += peers.attention_implementations(device, HEADS, HEADDIM)
    for work in ("forward", "training"):
        for dtype in ("float32", "bfloat16"):
            yield Case(
                f"Linformer of 12 heads of 64, rank {RANK}", Setting(work, dtype, device=device),
                tuple(implementations), baseline="attention (SDPA, flash)", lengths=TOKEN_LENGTHS, unit="tokens",
                units_per_second=None, facts={"heads": HEADS, "headdim": HEADDIM, "rank": RANK},
            )  # fmt: skip
