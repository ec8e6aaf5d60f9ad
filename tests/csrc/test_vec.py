"""csrc/common/vec.h on every instruction set of this machine, against fp64 and extended precision."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from linconv.ops import dispatch

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")
MARCH = {
    "v3": ["-march=x86-64-v3"],
    "v4": ["-march=x86-64-v4"],
    "v4_bf16": ["-march=x86-64-v4", "-mavx512bf16"],
    "neon": [],
}
ISAS = [isa for isa, supported in dispatch.build_info().get("isas", {}).items() if supported]
TAGS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # DType of csrc/common/dtype.h
CTYPES = {np.float32: "float", np.float64: "double"}

pytestmark = pytest.mark.skipif(not ISAS or COMPILER is None, reason="needs the CPU library and a C++ compiler")


@pytest.fixture(scope="module", params=ISAS)
def probe(request, tmp_path_factory):
    library = tmp_path_factory.mktemp("vec") / f"probe_{request.param}.so"
    flags = ["-std=c++20", "-O3", "-fPIC", "-shared", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    flags += [*MARCH[request.param], f"-DLINCONV_ISA={request.param}", f"-I{ROOT / 'csrc'}"]
    subprocess.run([COMPILER, *flags, Path(__file__).with_name("vec_probe.cpp"), "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.sum_float.restype, loaded.sum_double.restype = ctypes.c_float, ctypes.c_double
    return loaded


def run(probe, name, x):
    out = np.full_like(x, np.nan)
    getattr(probe, f"{name}_{CTYPES[x.dtype.type]}")(
        ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(x.size)
    )
    return out


def ulps(got, exact):
    """Distance in units of the last place of the correctly rounded result."""
    rounded = exact.astype(got.dtype)
    unit = np.spacing(np.abs(rounded)).astype(np.longdouble)
    return np.abs(got.astype(np.longdouble) - exact) / unit


FUNCTIONS = {
    "exp": np.exp,
    "exp2": np.exp2,
    "log1p_unit": np.log1p,
    "softplus": lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
}
LIMITS = {"exp": 1.0, "exp2": 1.5, "log1p_unit": 2.0, "softplus": 3.0, "sigmoid": 3.0, "silu": 3.0}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_accuracy_over_the_full_range(probe, name, dtype):
    low, high = (-103.9, 88.7) if dtype is np.float32 else (-745.0, 709.7)
    rng = np.random.default_rng(0)
    if name == "exp2":
        low, high = (-149.9, 127.9) if dtype is np.float32 else (-1074.9, 1023.9)
    if name == "log1p_unit":
        x = np.concatenate([rng.uniform(0, 1, 100_003), 10.0 ** rng.uniform(-30, 0, 100_000), [0, 1]])
    else:
        if name in ("sigmoid", "silu"):  # beyond, e^-x overflows and the result is 0, as torch's is
            low = -high
        x = np.concatenate([rng.uniform(low, high, 200_003), rng.uniform(-1, 1, 100_000), [0, low, high]])
        x = np.concatenate([x, rng.choice([-1, 1], 50_000) * 10.0 ** rng.uniform(-30, 0, 50_000)])
    x = x.astype(dtype)
    got = run(probe, name, x)
    exact = FUNCTIONS[name](x.astype(np.longdouble))
    assert np.finfo(np.longdouble).nmant > 60, "this test wants extended precision"
    assert ulps(got, exact).max() <= LIMITS[name]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp_at_the_ends(probe, dtype):
    x = np.array([np.inf, -np.inf, np.nan, -0.0, 1e30, -1e30, 100 if dtype is np.float32 else 720] * 5, dtype)
    expected = np.array([np.inf, 0, np.nan, 1, np.inf, 0, np.inf] * 5, dtype)
    np.testing.assert_array_equal(run(probe, "exp", x), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp2_at_the_ends(probe, dtype):
    """Near 0 the difference to 1 keeps its own accuracy: a decay near 1 is raised to the power of many steps."""
    x = np.array([-np.inf, np.nan, -0.0, -1e30, 200 if dtype is np.float32 else 1100] * 7, dtype)
    np.testing.assert_array_equal(run(probe, "exp2", x), np.array([0, np.nan, 1, 0, np.inf] * 7, dtype))
    unit = np.finfo(dtype).eps
    x = np.array([-n * unit / 2 for n in range(1, 200)], dtype)
    exact = np.expm1(x.astype(np.longdouble) * np.log(np.longdouble(2)))
    assert np.abs((run(probe, "exp2", x) - dtype(1)) - exact).max() <= unit / 4 * 1.01


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_special_values_match_torch(probe, dtype):
    x = np.array([np.inf, -np.inf, np.nan, 1e30, -1e30] * 7, dtype)
    for name, function in [
        ("softplus", torch.nn.functional.softplus),
        ("sigmoid", torch.sigmoid),
        ("silu", torch.nn.functional.silu),
    ]:
        expected = function(torch.from_numpy(x)).numpy()
        np.testing.assert_array_equal(run(probe, name, x), expected, err_msg=name)


@pytest.mark.parametrize("strides", [(1, 1), (3, 1), (1, 2), (2, 5), (-1, 1)])
@pytest.mark.parametrize("target", TAGS)
@pytest.mark.parametrize("source", TAGS)
def test_conversions_match_torch(probe, source, target, strides):
    n = 301
    special = [
        0.0,
        -0.0,
        float("inf"),
        float("-inf"),
        float("nan"),
        65504.0,
        65520.0,
        65519.0,
        1e-8,
        6e-8,
        3.4e38,
        1e-40,
    ]
    values = torch.cat([torch.tensor(special, dtype=torch.float64), torch.randn(n - len(special), dtype=torch.float64)])
    # halfway cases of bf16 and fp16: to even, both ways
    values[20:24] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11], dtype=torch.float64)
    source_step, target_step = strides
    source_row = torch.zeros(n * abs(source_step), dtype=source)
    taken = source_row[:: abs(source_step)]
    taken.copy_(values.to(source))
    first = source_row.data_ptr() + (n - 1) * source_row.element_size() * (source_step < 0)
    expected = taken.flip(0) if source_step < 0 else taken
    double = torch.float64 in (source, target)
    out = torch.full((n * target_step,), 7.0, dtype=target)
    scratch = torch.empty(n, dtype=torch.float64 if double else torch.float32)
    convert = probe.convert_double if double else probe.convert_float
    convert(
        ctypes.c_void_p(first), TAGS[source], ctypes.c_int64(source_step),
        ctypes.c_void_p(out.data_ptr()), TAGS[target], ctypes.c_int64(target_step),
        ctypes.c_int64(n), ctypes.c_void_p(scratch.data_ptr()),
    )  # fmt: skip
    torch.testing.assert_close(out[::target_step], expected.to(target), rtol=0, atol=0, equal_nan=True)
    untouched = torch.ones(out.numel(), dtype=torch.bool)
    untouched[::target_step] = False
    assert (out[untouched] == 7).all()


def test_bfloat16_keeps_every_nan(probe):
    """A NaN whose payload is all in the bits that bfloat16 cuts must not become infinity."""
    bits = torch.tensor([0x7F800001, -0x7FFFFF, 0x7FC00000, 0x7FFFFFFF] * 9, dtype=torch.int64)
    x = bits.to(torch.int32).view(torch.float32)
    out = torch.zeros(x.numel(), dtype=torch.bfloat16)
    scratch = torch.empty_like(x)
    probe.convert_float(
        ctypes.c_void_p(x.data_ptr()), 0, ctypes.c_int64(1), ctypes.c_void_p(out.data_ptr()), 2, ctypes.c_int64(1),
        ctypes.c_int64(x.numel()), ctypes.c_void_p(scratch.data_ptr()),
    )  # fmt: skip
    assert x.isnan().all() and out.isnan().all()


def test_sum_over_lanes(probe):
    x = np.arange(1, 17, dtype=np.float32)
    lanes = probe.width_float()
    assert probe.sum_float(ctypes.c_void_p(x.ctypes.data)) == x[:lanes].sum()
    x = x.astype(np.float64)
    assert probe.sum_double(ctypes.c_void_p(x.ctypes.data)) == x[: lanes // 2].sum()
