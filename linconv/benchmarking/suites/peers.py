"""What several suites compare with: attention by every kernel torch has, and packages that may not be installed."""

import contextlib
import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from linconv.benchmarking.suite import Absent, Cost, Implementation
from linconv.ops.packages import import_singly

_PACKAGES = {  # module: package
    "mamba_ssm": "mamba-ssm",
    "causal_conv1d": "causal-conv1d",
    "fla": "flash-linear-attention",
    "liger_kernel": "liger-kernel",
}

_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def need(module: str, device: str):
    """Import a module of an optional package that runs only on CUDA.

    Raises:
        Absent: it is not installed or does not import, or the device is not CUDA.
    """
    package = _PACKAGES[module.split(".")[0]]
    if importlib.util.find_spec(module.split(".")[0]) is None:
        raise Absent(f"{package} is not installed: pip install 'linconv[peers]'")
    if device != "cuda":
        raise Absent(f"{package} runs on CUDA devices only, the device here is {device}")
    try:
        return import_singly(module)
    except Exception as error:  # a package built for another torch may raise any type
        raise Absent(f"{package} does not import: {error}") from error


def sdpa_kinds(device: str) -> tuple[str, ...]:
    """Names of the kernels that torch's scaled_dot_product_attention may use on a device."""
    return ("flash", "math") if device == "cpu" else tuple(_SDPA)


def eager(q, k, v):
    """Attention by its formula, with the whole matrix of weights."""
    weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)
    return weights @ v


def sdpa(kind, q, k, v):
    with sdpa_kernel(_SDPA[kind]) if kind in _SDPA else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v)


def attention(setting, length, heads, headdim, kind):
    """Exact attention between all frames from q, k and v; ``kind`` is a name of `sdpa_kinds`, or "eager"."""
    q, k, v = (setting.tensor(setting.batch, heads, length, headdim) for _ in range(3))
    function = eager if kind == "eager" else functools.partial(sdpa, kind)
    return functools.partial(function, q, k, v), [q, k, v]


def weights_bytes(heads, setting, length):
    """Memory of attention weights, scores and their gradients, for attention that keeps the matrix."""
    return _matrices(setting) * setting.batch * heads * length**2 * torch.finfo(setting.torch_dtype).bits // 8


def weights_bytes_in_float32(heads, setting, length):
    """The same for torch's own formula, which converts half precision to float32."""
    return max(4 * _matrices(setting) * setting.batch * heads * length**2, weights_bytes(heads, setting, length))


def _matrices(setting):
    return 2 if setting.work == "forward" else 4


def attention_implementations(device, heads, headdim):
    """Exact attention by each of torch's kernels, and by the formula."""
    matrices = {"math": weights_bytes_in_float32, "eager": weights_bytes}
    for kind in (*sdpa_kinds(device), "eager"):
        yield Implementation(
            "eager attention" if kind == "eager" else f"attention (SDPA, {kind})", attention, (heads, headdim, kind),
            degree=2, cost=functools.partial(attention_cost, heads, headdim),
            memory=functools.partial(matrices[kind], heads) if kind in matrices else None,
        )  # fmt: skip


def attention_cost(heads, headdim, setting, length):
    """Two products in forward; in backward four more and the scores again."""
    products = 2 if setting.work == "forward" else 7
    return Cost(flops=products * 2 * setting.batch * heads * headdim * length**2, dtype=setting.dtype)
