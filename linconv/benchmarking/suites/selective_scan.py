"""The selective scan of Mamba against plain torch, transformers' own fallback, and mamba-ssm."""

import functools

import torch
import torch.nn.functional as F

from linconv import ops
from linconv.benchmarking.suite import Absent, Case, Cost, Implementation, Setting, judge
from linconv.benchmarking.suites import peers
from linconv.benchmarking.suites.backends import by_backend
from linconv.ops.selective_scan import reference

CHANNELS, STATES = 1536, 16  # those of a Mamba of width 768
# Per state entry and frame, where a multiply-add is two and an exponential is 16 (a multiply-add for each of
# six coefficients, and four to bring it into range and back): see docs/kernels/selective_scan.md.
OPERATIONS = {"forward": 22, "training": 22 + 59}


def inputs(setting, length):
    """x, dt, A, B, C, D, z, dt_bias: steps and rates as in a newly initialised layer."""
    batch = setting.batch
    return [
        setting.tensor(batch, length, CHANNELS), setting.tensor(batch, length, CHANNELS, scale=0.1),
        setting.tensor(CHANNELS, STATES, scale=0.1, shift=1.0, dtype=torch.float32),
        setting.tensor(batch, length, 1, STATES), setting.tensor(batch, length, 1, STATES),
        setting.tensor(CHANNELS, dtype=torch.float32), setting.tensor(batch, length, CHANNELS),
        setting.tensor(CHANNELS, shift=-4.0, dtype=torch.float32),
    ]  # fmt: skip


def ours(x, dt, A_log, B, C, D, z, dt_bias, backend=None):
    return ops.selective_scan(
        x, dt, -A_log.exp(), B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=True, backend=backend
    )  # fmt: skip


def in_torch(scan, x, dt, A_log, B, C, D, z, dt_bias):
    return reference.selective_scan(
        x, dt, -A_log.exp(), B, C, D, z, dt_bias=dt_bias, dt_softplus=True, scan=getattr(reference, scan)
    )[0]


def transformers_fallback(x, dt, A_log, B, C, D, z, dt_bias):
    from transformers.models.mamba import modeling_mamba

    if not hasattr(modeling_mamba, "mamba_selective_scan"):
        raise Absent("this version of transformers has no function for it")
    function = modeling_mamba.mamba_selective_scan
    function = getattr(function, "__wrapped__", function)  # the undecorated fallback
    # Without z, since the fallback multiplies it in the arguments' dtype.
    y = function(
        x.mT, dt.mT, -A_log.exp(), B.squeeze(2).mT, C.squeeze(2).mT, D, delta_bias=dt_bias, delta_softplus=True
    )
    return y.mT * F.silu(z)


def mamba_ssm(x, dt, A_log, B, C, D, z, dt_bias):
    kernel = peers.need("mamba_ssm.ops.selective_scan_interface", x.device.type).selective_scan_fn
    B, C = (t.permute(0, 2, 3, 1) for t in (B, C))  # (b, groups, dstate, L)
    return kernel(x.mT, dt.mT, -A_log.exp(), B, C, D, z.mT, dt_bias, delta_softplus=True).mT


def run(setting, length, function):
    tensors = inputs(setting, length)
    return functools.partial(function, *tensors), tensors


def check(function, setting):
    plain = functools.partial(in_torch, "recurrence")
    judge(function, plain, plain, inputs(setting, 200))


def states_bytes(setting, length):
    """Memory of plain torch: decays, added terms, C and products, for every frame, channel and entry."""
    return (5 if setting.work == "forward" else 12) * setting.batch * length * CHANNELS * STATES * 4


def cost(setting, length):
    """Forward reads x, dt, z, B, C and writes the result; backward reads them and dy and writes a gradient of each."""
    frames, size = setting.batch * length, torch.finfo(setting.torch_dtype).bits // 8
    tensors = 4 if setting.work == "forward" else 4 + 7
    return Cost(
        flops=OPERATIONS[setting.work] * frames * CHANNELS * STATES, bytes=tensors * frames * CHANNELS * size,
        dtype="float32",
    )  # fmt: skip


def cases(device):
    step_by_step, by_doubling = (functools.partial(in_torch, scan) for scan in ("recurrence", "doubling"))
    implementations = (
        *(
            Implementation(name, run, (function,), ours=True, check=functools.partial(check, function), cost=cost)
            for name, function in by_backend(ours, device)
        ),
        Implementation("plain torch, step by step", run, (step_by_step,), memory=states_bytes),
        Implementation("plain torch, by doubling", run, (by_doubling,), memory=states_bytes),
        Implementation("transformers' fallback", run, (transformers_fallback,), memory=states_bytes),
        Implementation("mamba-ssm", run, (mamba_ssm,), check=functools.partial(check, mamba_ssm)),
    )
    for work in ("forward", "training"):
        for dtype in ("float32", "bfloat16"):
            yield Case(
                f"selective scan of {CHANNELS} channels", Setting(work, dtype, device=device), implementations,
                baseline="plain torch, step by step", facts={"channels": CHANNELS, "states": STATES},
            )  # fmt: skip
