import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import DTYPES, alike_for_threads, gradients, no_worse_than_torch, on_instruction_set, same_bits

from linconv.ops import dispatch
from linconv.ops.linear import linear

# Products are torch's own on other devices: there is no kernel to be judged there.
pytestmark = pytest.mark.skipif(not dispatch.compiled("linear"), reason="the compiled library is not there")


def kernel(x, weight, bias=None, factor=None):
    return torch.ops.linconv.linear(x, weight, bias, factor)


def loop(x, weight, bias=None, factor=None):
    """The definition, one row after another."""
    rows = []
    for i, row in enumerate(x):
        out = (row * weight).sum(-1)
        if bias is not None:
            out = out + (bias if factor is None else factor[i] * bias)
        rows.append(out)
    return torch.stack(rows) if rows else x @ weight.mT


def random(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([0, 1, 2, 3, 4, 7, 8, 64, 65, 130, 1_030]),
    depth=st.sampled_from([0, 1, 5, 16, 255, 256, 257, 530, 2_060]),
    columns=st.sampled_from([0, 1, 15, 32, 33, 64, 100]),
    bias=st.sampled_from(["none", "plain", "factor"]),
    by_column=st.booleans(),
)
def test_oracle(rows, depth, columns, bias, by_column):
    x, weight = random(rows, depth), random(columns, depth)
    if by_column:  # the other of two ways to read either
        x, weight = random(depth, rows).mT, random(depth, columns).mT
    inputs = [x, weight, None if bias == "none" else random(columns), random(rows) if bias == "factor" else None]
    upstream = random(rows, columns)
    wanted = gradients(loop, inputs, upstream)
    got = gradients(kernel, inputs, upstream)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "rows, depth, columns",
    [
        (130, 768, 300),
        (40, 3_000, 70),
        (70, 2_049, 40),
        (3_000, 40, 70),
        (41, 531, 33),
        (9, 1, 5),
        (1, 768, 300),
        (4, 531, 70),
    ],
)
def test_oracle_low_precision(dtype, rows, depth, columns):
    inputs = [
        random(rows, depth, dtype=dtype),
        random(columns, depth, dtype=dtype) / depth**0.5,
        random(columns, dtype=dtype),
    ]
    upstream = random(rows, columns, dtype=dtype)
    exact, exact_gradients = gradients(F.linear, [t.double() for t in inputs], upstream.double())
    theirs, their_gradients = gradients(F.linear, inputs, upstream)
    ours, our_gradients = gradients(kernel, inputs, upstream)
    no_worse_than_torch(ours, theirs, exact, 2, "y")
    for name, *parts in zip(["x", "weight", "bias"], our_gradients, their_gradients, exact_gradients):
        no_worse_than_torch(*parts, 3, f"gradient of {name}")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 has two instruction sets to choose from")
def test_other_instruction_set():
    on_instruction_set("v3", __file__, "oracle or alone or strides")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_what_it_is_alone(dtype):
    """Bit for bit, whatever the other rows hold and however many they are; so are gradients of x."""
    weight, bias = random(300, 530, dtype=dtype), random(300, dtype=dtype)
    x, upstream = random(133, 530, dtype=dtype), random(133, 300, dtype=dtype)
    x[100] = torch.nan
    upstream[101] = torch.inf
    y, (grad, _, _) = gradients(kernel, [x, weight, bias], upstream)
    for first, last in ((0, 1), (1, 3), (3, 6), (6, 10), (7, 12), (64, 100), (100, 101), (101, 133)):
        alone, (alone_grad, _, _) = gradients(kernel, [x[first:last], weight, bias], upstream[first:last])
        same_bits(y[first:last], alone)
        same_bits(grad[first:last], alone_grad)


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype, rows):
    """Slices, transposes, expansions and reversed axes give what contiguous copies give."""
    depth, columns = 1_300, 50
    x, weight = random(rows, depth, dtype=dtype), random(columns, depth, dtype=dtype)
    bias, factor = random(2 * columns, dtype=dtype)[::2], random(3 * rows, dtype=dtype)[1::3]
    views = {
        "slice": lambda t: F.pad(t, (3, 5, 2, 1))[2:-1, 3:-5],
        "step": lambda t: t.repeat_interleave(2, 1)[:, ::2],
        "transpose": lambda t: t.mT.contiguous().mT,
        "rows expanded": lambda t: t[:1].expand(t.shape),
        "columns expanded": lambda t: t[:, :1].expand(t.shape),
    }
    for of_x in views.values():
        for of_weight in views.values():
            a, b = of_x(x), of_weight(weight)
            same_bits(
                kernel(a, b, bias, factor), kernel(a.contiguous(), b.contiguous(), bias.contiguous(), factor.clone())
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [0, 300, 1_100])
def test_into_memory(dtype, depth):
    """The product in the math dtype, in place of what is there or on top of it."""
    x, weight = random(40, depth, dtype=dtype), random(70, depth, dtype=dtype)
    wide = torch.full((40, 90), torch.nan, dtype=torch.promote_types(dtype, torch.float32))
    out, torchs, exact = wide[:, 10:80], x @ weight.mT, loop(x.double(), weight.double())
    for times in (1, 2):
        torch.ops.linconv.linear_out(out, x, weight, times > 1)
        no_worse_than_torch(out, times * torchs, times * exact, 2, "out")
    assert wide[:, :10].isnan().all() and wide[:, 80:].isnan().all()
    with pytest.raises(RuntimeError, match="out: wanted"):
        torch.ops.linconv.linear_out(out.half(), x, weight, False)
    with pytest.raises(RuntimeError, match="weight has size"):
        torch.ops.linconv.linear_out(out, x, random(70, depth + 1, dtype=dtype), False)


def test_rows_far_apart():
    """Offsets beyond 32 bits: rows 2^31 elements apart. Memory between them is never touched."""
    far = torch.empty(2**31 + 8, dtype=torch.bfloat16).as_strided((2, 8), (2**31, 1))
    far.copy_(random(2, 8))
    near = far.contiguous()
    same_bits(kernel(far, far), kernel(near, near))


def test_bits_do_not_depend_on_the_number_of_threads():
    inputs = [random(300, 1_600).float(), random(500, 1_600).float(), random(500).float()]
    alike_for_threads(lambda: [kernel(*inputs)])


def test_gradients_of_any_order():
    inputs = tuple(t.requires_grad_() for t in (random(3, 4), random(5, 4), random(5), random(3)))
    assert torch.autograd.gradcheck(kernel, inputs)
    assert torch.autograd.gradgradcheck(kernel, inputs)


def test_only_wanted_gradients_are_made():
    """A frozen weight costs no product."""
    x, weight, bias = random(3, 4).requires_grad_(), random(5, 4), random(5)
    out = kernel(x, weight, bias)
    with torch.profiler.profile() as profile:
        out.sum().backward()
    calls = [e.count for e in profile.key_averages() if e.key == "linconv::linear"]
    assert calls == [1]


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias):
    inputs = [t.requires_grad_() for t in (random(3, 4), random(5, 4))]
    torch.library.opcheck(
        torch.ops.linconv.linear.default,
        (*inputs, random(5).requires_grad_() if bias else None, random(3) if bias else None),
    )


@pytest.mark.parametrize("lead", [(), (0,), (4,), (2, 3), (2, 0, 3)])
def test_any_leading_dimensions(lead):
    x, weight, bias, factor = random(*lead, 6), random(5, 6), random(5), random(*lead)
    got = gradients(lambda *t: linear(*t[:3], factor=t[3]), [x, weight, bias, factor], random(*lead, 5))
    wanted = gradients(
        lambda *t: linear(*t[:3], factor=t[3], backend="reference"), [x, weight, bias, factor], torch.ones(*lead, 5)
    )
    assert got[0].shape == (*lead, 5)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-12, atol=1e-12)


def test_no_columns():
    x, weight, bias = random(2, 3, 0), random(5, 0), random(5)
    assert torch.equal(linear(x, weight, bias), bias.expand(2, 3, 5))
    assert linear(random(2, 0, 0), weight, bias).shape == (2, 0, 5)


def test_a_factor_of_no_bias_does_nothing():
    inputs = [random(4, 6), random(5, 6), random(4)]
    y, (*_, of_factor) = gradients(lambda x, w, f: linear(x, w, factor=f), inputs, torch.ones(4, 5))
    torch.testing.assert_close(y, inputs[0] @ inputs[1].mT)
    assert not of_factor.any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_parameters_in_another_precision(backend):
    """Gradients come in each one's dtype, and are not rounded to another's on the way."""
    x, weight, bias = random(20, 16).half(), random(8, 16).float(), random(8).float()
    upstream = random(20, 8).half()
    y, grads = gradients(lambda *t: linear(*t, backend=backend), [x, weight, bias], upstream)
    assert y.dtype == torch.float16 and [g.dtype for g in grads] == [torch.float16, torch.float32, torch.float32]
    exact = gradients(F.linear, [t.double() for t in (x, weight, bias)], upstream.double())[1]
    for got, wanted in zip(grads[1:], exact[1:]):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_decides_the_dtype(backend):
    x, weight, bias, factor = random(20, 16).half(), random(8, 16).float(), random(8).float(), random(20).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias, backend=backend).dtype == torch.bfloat16
        assert linear(x, weight, bias, factor=factor, backend=backend).dtype == torch.bfloat16


def test_who_multiplies():
    """The reference is torch's own product; under autocast it is ours in autocast's dtype."""
    x, weight, bias = random(20, 16).float(), random(8, 16).float(), random(8).float()

    def products(function):
        with torch.profiler.profile() as profile:
            function()
        return {e.key for e in profile.key_averages()} & {"linconv::linear", "aten::linear"}

    assert products(lambda: linear(x, weight, bias)) == {"linconv::linear"}
    assert products(lambda: linear(x, weight, bias, backend="cpu")) == {"linconv::linear"}
    assert products(lambda: linear(x, weight, bias, backend="reference")) == {"aten::linear"}
    assert products(lambda: linear(x.bfloat16(), weight.bfloat16())) == {"linconv::linear"}
    with torch.autocast("cpu", torch.bfloat16):
        assert products(lambda: linear(x, weight, bias)) == {"linconv::linear"}
        same_bits(linear(x, weight, bias), kernel(x.bfloat16(), weight.bfloat16(), bias))
        assert linear(x.double(), weight.double()).dtype == torch.float64
        y, grads = gradients(linear, [x, weight, bias], torch.ones(20, 8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in grads)


def test_compile():
    inputs = [random(20, 16), random(8, 16), random(8)]
    compiled = torch.compile(lambda *t: linear(*t).relu(), fullgraph=True, backend="aot_eager")
    plain = gradients(lambda *t: linear(*t).relu(), inputs, torch.ones(20, 8))
    torch.testing.assert_close(gradients(compiled, inputs, torch.ones(20, 8)), plain, rtol=0, atol=0)


X, W = torch.zeros(5, 6), torch.zeros(4, 6)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((None, W), {}, TypeError, "x is NoneType"),
        ((X, W.long()), {}, TypeError, "weight has dtype torch.int64"),
        ((X, W.double()), {}, TypeError, "weight is torch.float64 and x is torch.float32"),
        ((X[0, 0], W), {}, ValueError, r"x has shape \(\), wanted \(..., d\)"),
        ((X, W[:, :5]), {}, ValueError, r"weight has shape \(4, 5\), wanted \(columns, d\) = \(any, 6\)"),
        ((X, W, torch.zeros(5)), {}, ValueError, r"bias has shape \(5,\), wanted \(columns,\) = \(4\)"),
        ((X, W, torch.zeros(4)), dict(factor=torch.zeros(4)), ValueError, r"factor has shape \(4,\), wanted \(...,\)"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        linear(*arguments, **options)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((X[None], W, None, None), "x has 3 dimensions"),
        ((X, W[:, :5], None, None), "weight has size 5 in dimension 1, wanted 6"),
        ((X, W, torch.zeros(5), None), "bias has size 5 in dimension 0, wanted 4"),
        ((X, W, torch.zeros(4), torch.zeros(4)), "factor has size 4 in dimension 0, wanted 5"),
        ((X, W.double(), None, None), "x and weight: wanted both or none in Double"),
    ],
)
def test_operator_checks_what_it_reads(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.linconv.linear(*arguments)


def test_memory_that_was_freed_is_not_read():
    """As that of a parameter which is sharded between its uses."""
    weight = W.clone()
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="weight has no memory: it has been freed"):
        torch.ops.linconv.linear(X, weight, None, None)
