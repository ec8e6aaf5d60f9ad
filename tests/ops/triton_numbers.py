"""How numbers get to kernels and products; run by test_triton.py."""

import interpreter
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from linconv.ops.triton_launch import launch
from linconv.ops.triton_math import exact_exp2
from linconv.ops.triton_numbers import bits_of, number_of, to_operand


@triton.jit(do_not_specialize=["bits"])
def store_number(out, bits, MATH: tl.constexpr):
    tl.store(out, number_of(bits, MATH))


@triton.jit
def store_operands(x, out, size, OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    values = tl.load(x + offset, mask=offset < size, other=0)
    tl.store(out + offset, to_operand(values, OPERAND, PRECISION), mask=offset < size)


@triton.jit
def store_powers(x, out, size, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + offset, exact_exp2(tl.load(x + offset, mask=offset < size, other=0)), mask=offset < size)


@pytest.mark.parametrize("number", [0.0, 1.0, -1.0, 0.1, 1 / 0.9, 20**-0.5, 1e-300])
def test_a_launch_takes_every_bit(number):
    for dtype, math in ((torch.float64, tl.float64), (torch.float32, tl.float32)):
        out = torch.full((1,), torch.nan, dtype=dtype, device=interpreter.DEVICE)
        launch(store_number, (1,), dict(out=out, bits=bits_of(number), MATH=math), 1)
        assert out.item() == torch.tensor(number, dtype=torch.float64).to(dtype).item()


def operands(x, operand, precision):
    out = torch.full(x.shape, torch.nan, device=interpreter.DEVICE)
    arguments = dict(x=x.to(interpreter.DEVICE), out=out, size=x.numel(), OPERAND=operand, PRECISION=precision)
    launch(store_operands, (1,), dict(arguments, BLOCK=triton.next_power_of_2(x.numel())), 1)
    return out.cpu()


def test_tf32_is_rounded_to_the_nearest():
    special = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, 1 + 2**-11, -1 - 2**-11, 1 + 3 * 2**-12, 1e-42]
    )
    x = torch.cat((special, torch.randn(1000)))
    got = operands(x, tl.float32, "tf32")
    assert not (got.numpy().view(np.uint32) & 0x1FFF).any()
    # Ten bits behind the first: half a unit in the last place at most.
    fraction, exponent = torch.frexp(x[10:].double())
    wanted = torch.ldexp((fraction * 2**11).round(), exponent - 11)
    ties = (fraction * 2**12) % 2 == 1
    assert torch.equal(got[10:][~ties].double(), wanted[~ties])
    assert got[:6].tolist() == x[:6].tolist() and torch.equal(got[:6].signbit(), x[:6].signbit())
    assert got[6:9].tolist() == [1 + 2**-10, -1 - 2**-10, 1 + 2**-10]  # ties go away from zero
    assert operands(torch.tensor([torch.nan]), tl.float32, "tf32").isnan().all()


def test_other_operands_are_what_they_are():
    x = torch.randn(100)
    for precision in ("ieee", "tf32x3"):
        assert torch.equal(operands(x, tl.float32, precision), x)
    assert torch.equal(operands(x.half(), tl.float32, "tf32"), x.half().float())
    assert torch.equal(operands(x, tl.bfloat16, "tf32"), x.bfloat16().float())


def powers(x):
    out = torch.full(x.shape, torch.nan, device=interpreter.DEVICE)
    blocks = triton.cdiv(x.numel(), 1024)
    launch(store_powers, (blocks,), dict(x=x.to(interpreter.DEVICE), out=out, size=x.numel(), BLOCK=1024), 4)
    return out.cpu()


@pytest.mark.filterwarnings("ignore:overflow")
def test_powers_of_two():
    """Within 1.5 units in the last place, a twentieth in the mean: decays are multiplied up by the thousand."""
    for low, high in ((-125.5, 128), (127, 128), (-8, 0), (-0.5, 0), (-(2**-6), 0), (-(2**-14), 2**-14)):
        x = torch.empty(50_000).uniform_(low, high)
        exact = torch.exp2(x.double())
        unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact)[1] - 24)
        error = (powers(x).double() - exact) / unit
        assert error.abs().max() <= 1.5 and error.mean().abs() <= 0.05, (low, high)
    whole = torch.arange(-125, 128).float()
    assert torch.equal(powers(whole), torch.exp2(whole))
    special = torch.tensor([0.0, -0.0, -126.0, -150.0, -1e30, -torch.inf, 128.0, 1e30, torch.inf, 1e-30, -1e-30])
    assert powers(special).tolist() == [1, 1, 0, 0, 0, 0, *[torch.inf] * 3, 1, 1]
    bits = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1, -(2**22)], dtype=torch.int32)
    assert powers(bits.view(torch.float32)).isnan().all()
