"""The short convolution in both directions against torch's own convolution between flips, and against causal-conv1d."""

import functools

import torch
import torch.nn.functional as F

from linconv import ops
from linconv.benchmarking.suite import Case, Cost, Implementation, Setting, judge
from linconv.benchmarking.suites import peers
from linconv.benchmarking.suites.backends import by_backend

CHANNELS, WIDTH = 1280, 4  # x, B and C of a layer of width 1024 with a state of 128


def inputs(setting, length):
    """x of both directions, weight, bias."""
    return [
        setting.tensor(2, setting.batch, length, CHANNELS),
        setting.tensor(2, CHANNELS, WIDTH, dtype=torch.float32), setting.tensor(2, CHANNELS, dtype=torch.float32),
    ]  # fmt: skip


def _two_passes(causal, x, weight, bias):
    return torch.stack([causal(x[0], weight[0], bias[0]), causal(x[1].flip(1), weight[1], bias[1]).flip(1)])


def in_torch(x, weight, bias):
    def causal(x, weight, bias):
        padded = F.pad(x.mT, (weight.shape[1] - 1, 0))
        return F.silu(F.conv1d(padded, weight[:, None].to(x.dtype), bias.to(x.dtype), groups=len(weight))).mT

    return _two_passes(causal, x, weight, bias)


def causal_conv1d(x, weight, bias):
    kernel = peers.need("causal_conv1d", x.device.type).causal_conv1d_fn
    return _two_passes(lambda x, w, b: kernel(x.mT, w, b, activation="silu").mT, x, weight, bias)


def run(setting, length, function):
    tensors = inputs(setting, length)
    return functools.partial(function, *tensors), tensors


def check(function, setting):
    judge(function, in_torch, in_torch, inputs(setting, 200))


def cost(setting, length):
    """Forward reads x and writes the result; backward reads x and the upstream gradient and writes one gradient."""
    tensors = 2 if setting.work == "forward" else 5
    size = torch.finfo(setting.torch_dtype).bits // 8
    return Cost(bytes=tensors * 2 * setting.batch * length * CHANNELS * size)


def cases(device):
    implementations = (
        *(
            Implementation(name, run, (function,), ours=True, check=functools.partial(check, function), cost=cost)
            for name, function in by_backend(ops.bidirectional_short_conv, device)
        ),
        Implementation("plain torch with flips", run, (in_torch,)),
        Implementation(
            "causal-conv1d with flips", run, (causal_conv1d,), check=functools.partial(check, causal_conv1d)
        ),
    )  # fmt: skip
    for work in ("forward", "training"):
        for dtype in ("float32", "bfloat16"):
            yield Case(
                f"short convolution of {CHANNELS} channels", Setting(work, dtype, device=device), implementations,
                baseline="plain torch with flips", facts={"channels": CHANNELS, "width": WIDTH},
            )  # fmt: skip
