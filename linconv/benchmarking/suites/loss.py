"""The losses of distillation against torch's, and against Liger's."""

import functools

import torch
import torch.nn.functional as F

from linconv import ops
from linconv.benchmarking.suite import TOKEN_LENGTHS, Case, Cost, Implementation, Setting, judge
from linconv.benchmarking.suites import peers
from linconv.benchmarking.suites.backends import by_backend

LAYERS, WIDTH = 24, 1024
TEMPERATURE = 2.0


def _math(x):
    return x if x.dtype == torch.float64 else x.float()


def layer_loss(function, teachers, *students):
    return function(list(students), [t.to(students[0].dtype) for t in teachers])


def mse_in_torch(students, teachers, layer_norm=True, mask=None):
    pairs = zip(students, teachers)
    if layer_norm:
        pairs = (tuple(F.layer_norm(_math(x), x.shape[-1:]) for x in pair) for pair in pairs)
    if mask is None:
        return torch.stack([F.mse_loss(s, t) for s, t in pairs]).mean()
    return torch.stack([((s - t).square().mean(-1) * mask).sum() / mask.sum() for s, t in pairs]).mean()


def layerwise_mse(students, teachers, backend=None):
    return ops.layerwise_mse(students, teachers, layer_norm=True, backend=backend)


def hidden_states(setting, length, function):
    students = [setting.tensor(setting.batch, length, WIDTH) for _ in range(LAYERS)]
    teachers = [setting.tensor(setting.batch, length, WIDTH).detach() for _ in range(LAYERS)]
    return functools.partial(layer_loss, function, teachers, *students), students


def kd_loss(student, teacher, backend=None):
    return ops.kd_loss(student, teacher, temperature=TEMPERATURE, backend=backend)


def kl_in_torch(student, teacher):
    student, teacher = (F.log_softmax(_math(x).flatten(0, -2) / TEMPERATURE, dim=-1) for x in (student, teacher))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def kl_of_liger(student, teacher):
    liger = peers.need("liger_kernel.transformers", student.device.type)
    student, teacher = (F.log_softmax(_math(x).flatten(0, -2) / TEMPERATURE, dim=-1) for x in (student, teacher))
    return liger.LigerKLDIVLoss(reduction="batchmean", log_target=True)(student, teacher)


def _with_teacher(function, teacher, student):
    return function(student, teacher.to(student.dtype))


def logits(setting, length, function, classes):
    student, teacher = (setting.tensor(setting.batch, length, classes) for _ in range(2))
    return functools.partial(_with_teacher, function, teacher.detach(), student), [student]


def check_mse(function, setting):
    students, teachers = ([setting.tensor(2, 50, 512) for _ in range(2)] for _ in range(2))
    teachers = [t.detach() for t in teachers]
    run = functools.partial
    judge(run(layer_loss, function, teachers), *2 * (run(layer_loss, mse_in_torch, teachers),), students)


def check_kl(function, setting):
    student, teacher = (setting.tensor(2, 50, 512).detach() for _ in range(2))
    run = functools.partial
    judge(run(_with_teacher, function, teacher), *2 * (run(_with_teacher, kl_in_torch, teacher),), [student])


def cost(elements, setting, length):
    """Forward reads both sides; backward reads both again and writes one gradient."""
    size = torch.finfo(setting.torch_dtype).bits // 8
    return Cost(bytes=(2 if setting.work == "forward" else 5) * size * setting.batch * length * elements)


def cases(device):
    for dtype in ("float32", "bfloat16"):
        setting = Setting("training", dtype, device=device)
        floor = functools.partial(cost, LAYERS * WIDTH)
        yield Case(
            f"layer-wise MSE with layer norm of {LAYERS} layers of {WIDTH}", setting,
            (
                *(
                    Implementation(name, hidden_states, (function,), ours=True,
                                   check=functools.partial(check_mse, function), cost=floor)
                    for name, function in by_backend(layerwise_mse, device)
                ),
                Implementation("plain torch", hidden_states, (mse_in_torch,)),
            ),
            baseline="plain torch", lengths=(249, 499, 1_499, 2_999, 5_999),
            facts={"layers": LAYERS, "width": WIDTH},
        )  # fmt: skip
        for classes, lengths, unit, rate in (
            (32, (249, 499, 1_499, 2_999, 5_999, 14_999, 29_999), "frames", 50),
            (50_257, TOKEN_LENGTHS[:4], "tokens", None),
        ):
            floor = functools.partial(cost, classes)
            yield Case(
                f"KL divergence of {classes:,} classes", setting,
                (
                    *(
                        Implementation(name, logits, (function, classes), ours=True,
                                       check=functools.partial(check_kl, function), cost=floor)
                        for name, function in by_backend(kd_loss, device)
                    ),
                    Implementation("plain torch", logits, (kl_in_torch, classes)),
                    Implementation("Liger", logits, (kl_of_liger, classes),
                                   check=functools.partial(check_kl, kl_of_liger)),
                ),
                baseline="plain torch", lengths=lengths, unit=unit, units_per_second=rate, facts={"classes": classes},
            )  # fmt: skip
