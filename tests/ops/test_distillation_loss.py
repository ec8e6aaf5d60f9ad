import math
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import DTYPES, alike_for_threads, device, here, no_worse_than_torch, on_instruction_set, same_bits  # noqa: F401

from linconv.ops import dispatch
from linconv.ops.distillation_loss import (
    distillation_loss,
    distillation_terms,
    kd_loss,
    layerwise_mse,
    linear,
    linear_kd_loss,
)

pytestmark = pytest.mark.skipif(not dispatch.compiled("distillation_loss"), reason="the compiled library is not there")
BACKENDS = ("compiled", "reference")


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def rows_of(lengths, *sides):
    """The valid rows of (batch, L, d) tensors, one after another."""
    ends = [sides[0].shape[1]] * len(sides[0]) if lengths is None else lengths.tolist()
    return [tuple(x[b, i] for x in sides) for b, n in enumerate(ends) for i in range(n)]


def loop_mse(s, t, lengths, layer_norm):
    """The definition, one row after another."""
    rows = rows_of(lengths, s, t)
    if layer_norm:
        rows = [[(x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() for x in pair] for pair in rows]
    return sum(((a - b).square().mean() for a, b in rows), s.sum() * 0) / max(len(rows), 1)


def loop_kd(s, t, lengths, temperature):
    total = s.sum() * 0
    rows = rows_of(lengths, s / temperature, t / temperature)
    for a, b in rows:
        p, q = b.exp() / b.exp().sum(), a.exp() / a.exp().sum()
        total = total + (p * (p / q).log()).sum()
    return total / max(len(rows), 1)


def leaves(tensors, dtype=None):
    return [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]


def values_and_gradients(loss, tensors, dtype=None):
    fresh = leaves(tensors, dtype)
    value = loss(*fresh)
    return [value.detach(), *torch.autograd.grad(value, fresh, materialize_grads=True)]


CASES = dict(
    batch=st.integers(0, 3),
    length=st.integers(0, 5),
    widths=st.lists(st.sampled_from([1, 3, 8, 16, 37]), min_size=1, max_size=3),
    classes=st.sampled_from([1, 2, 5, 16, 1025]),
    lengths=st.none() | st.integers(0, 5),
    layer_norm=st.booleans(),
    temperature=st.sampled_from([1.0, 3.0]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**CASES, backend=st.sampled_from(BACKENDS))
def test_oracle(**case):
    agrees_with_the_definition(**case)


def agrees_with_the_definition(batch, length, widths, classes, lengths, layer_norm, temperature, backend="compiled"):
    if lengths is not None:
        lengths = torch.tensor([min(lengths + i, length) for i in range(batch)], dtype=torch.int32)
    n = len(widths)
    tensors = [random(batch, length, d) for d in (*widths, *widths, classes, classes)]

    def ours(*x):
        terms = distillation_terms(
            x[:n],
            x[n : 2 * n],
            *x[2 * n :],
            temperature=temperature,
            mask=lengths,
            logits_mask=lengths,
            layer_norm=layer_norm,
            backend=here(backend),
        )
        weights = torch.arange(1, n + 1)
        return (terms.mse * weights).sum() + 3 * terms.kd

    def definition(*x):
        mse = sum((i + 1) * loop_mse(x[i], x[n + i], lengths, layer_norm) for i in range(n))
        return mse + 3 * loop_kd(*x[2 * n :], lengths, temperature)

    got, wanted = values_and_gradients(ours, tensors), values_and_gradients(definition, tensors)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("widths", [[9000], [3] * 60])
def test_rows_longer_than_registers_and_layers_more_than_a_launch(widths):
    agrees_with_the_definition(1, 2, widths, 5, None, layer_norm=True, temperature=2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("other", [None, torch.float32])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_oracle_low_precision(dtype, other, layer_norm):
    """Errors are those of torch's own operators in the same precision, at most twice; three times for gradients."""
    shapes = [(2, 30, 100), (2, 30, 100), (2, 30, 3001), (2, 30, 3001)]
    tensors = [random(*shape, dtype=(other or dtype) if i % 2 else dtype) for i, shape in enumerate(shapes)]

    def in_torch(s, t, a, b):
        if layer_norm:
            s, t = (F.layer_norm(x, x.shape[-1:]) for x in (s, t))
        a, b = (F.log_softmax(x.flatten(0, 1) / 2, -1) for x in (a, b))
        return F.mse_loss(s, t.to(s.dtype)) + F.kl_div(a, b.to(a.dtype), reduction="batchmean", log_target=True)

    def ours(s, t, a, b):
        return distillation_loss([s], [t], a, b, layer_norm=layer_norm, backend=here())

    exact = values_and_gradients(in_torch, tensors, torch.float64)
    theirs = values_and_gradients(in_torch, [t.to(dtype) for t in tensors])
    got = values_and_gradients(ours, tensors)
    assert got[0].dtype == torch.float32 and [g.dtype for g in got[1:]] == [t.dtype for t in tensors]
    # A loss is one number, which torch may hit by chance: its precision is what is asked for.
    assert abs(got[0].double() - exact[0]) <= 1e-6 * exact[0]
    for name, g, t, e in zip(
        ["student", "teacher", "student_logits", "teacher_logits"], got[1:], theirs[1:], exact[1:]
    ):
        no_worse_than_torch(g, t, e, 3, f"gradient of {name}")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 has two instruction sets to choose from")
def test_other_instruction_set():
    on_instruction_set("v3", __file__, "oracle or alone")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer_norm", [False, True])
def test_padded_is_alone(dtype, layer_norm):
    """Bit for bit, whatever stands in the padding; gradients there are zeros; a bool mask is what lengths are."""
    length, n = 90, 67
    tensors = [random(1, length, d, dtype=dtype) for d in (40, 40, 33, 33)]
    padded = [t.clone() for t in tensors]
    for i, t in enumerate(padded):
        t[:, n:] = (torch.nan, torch.inf)[i % 2]

    def loss(mask):
        return lambda s, t, a, b: distillation_loss(
            [s], [t], a, b, mask=mask, logits_mask=mask, layer_norm=layer_norm, backend=here()
        )

    alone = values_and_gradients(loss(None), [t[:, :n] for t in tensors])
    for mask in (torch.tensor([n]), torch.arange(length)[None] < n):
        value, *grads = values_and_gradients(loss(mask), padded)
        same_bits(value, alone[0])
        for got, wanted in zip(grads, alone[1:]):
            same_bits(got[:, :n], wanted)
            assert not got[:, n:].any()


def test_any_bool_mask():
    mask = torch.rand(3, 41) < 0.5
    tensors = [random(3, 41, 24), random(3, 41, 24), random(3, 41, 9), random(3, 41, 9)]
    ours = values_and_gradients(
        lambda s, t, a, b: distillation_loss(
            [s], [t], a, b, mask=mask, logits_mask=mask, layer_norm=True, backend=here()
        ),
        tensors,
    )
    chosen = values_and_gradients(
        lambda s, t, a, b: distillation_loss([s], [t], a, b, layer_norm=True, backend=here()),
        [t[mask][None] for t in tensors],
    )
    torch.testing.assert_close(ours[0], chosen[0], rtol=1e-13, atol=0)
    for got, wanted in zip(ours[1:], chosen[1:]):
        torch.testing.assert_close(got[mask], wanted[0], rtol=1e-12, atol=1e-15)
        assert not got[~mask].any()


def test_terms_are_the_parts():
    student, teacher = ([random(2, 7, d).float() for d in (16, 5)] for _ in range(2))
    a, b, mask = random(2, 7, 6).float(), random(2, 7, 6).float(), torch.tensor([7, 3])
    for backend in BACKENDS:
        terms = distillation_terms(student, teacher, a, b, mask=mask, layer_norm=True, backend=here(backend))
        same = layerwise_mse(student, teacher, mask=mask, layer_norm=True, reduction="none", backend=here(backend))
        assert torch.equal(terms.mse, same) and not terms.cosine.requires_grad
        assert terms.kd == kd_loss(a, b, backend=here(backend))
        for got, s, t in zip(terms.cosine, student, teacher):
            wanted = [F.cosine_similarity(x, y, dim=0) for x, y in rows_of(mask, s, t)]
            torch.testing.assert_close(got, torch.stack(wanted).mean())
    assert distillation_terms(student, teacher).kd == 0
    assert distillation_terms(student_logits=a, teacher_logits=b).mse.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 33, 5000])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_identical_inputs_give_exactly_zero(dtype, classes, layer_norm):
    x = 100 * random(2, 9, classes, dtype=dtype)
    value, *grads = values_and_gradients(
        lambda s, t, a, b: distillation_loss([s], [t], a, b, layer_norm=layer_norm, backend=here()), [x] * 4
    )
    assert value == 0 and not any(g.any() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [4, 3000])
def test_logits_of_minus_infinity(backend, classes):
    """A class that the teacher excludes adds nothing; one that only the student excludes makes the loss infinite."""
    s, t = random(1, 3, classes), random(1, 3, classes)
    # The first 1,024 classes of the larger case, a whole step of the kernel, among them.
    both = torch.zeros(classes, dtype=torch.bool)
    both[: classes // 2] = True
    s[..., both], t[..., both] = -math.inf, -math.inf
    value, grad_s, grad_t = values_and_gradients(lambda a, b: kd_loss(a, b, backend=here(backend)), [s, t])
    wanted = kd_loss(s[..., ~both], t[..., ~both], backend=here(backend))
    torch.testing.assert_close(value, wanted)
    assert not grad_s[..., both].any() and grad_s.isfinite().all()
    if backend == "compiled":  # torch's own log-softmax gives NaN
        assert not grad_t[..., both].any() and grad_t.isfinite().all()
    only_teacher = t.clone()
    only_teacher[..., -1] = -math.inf
    assert kd_loss(s, only_teacher, backend=here(backend)).isfinite()
    assert kd_loss(only_teacher, t, backend=here(backend)) == math.inf


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_logits(backend):
    s, t = torch.zeros(1, 1, 2000), torch.zeros(1, 1, 2000)
    s[..., 3], t[..., 1999] = 1e30, 1e30
    for temperature in (2.0, 3.0):
        assert kd_loss(t, t, temperature=temperature, backend=here(backend)) == 0
    assert kd_loss(s, t, temperature=3.0, backend=here(backend)).item() == pytest.approx(1e30 / 3)
    assert kd_loss(s, t, temperature=1.0, backend=here(backend)).item() == pytest.approx(1e30)
    s, t = 1e4 * random(1, 20, 2000).float(), 1e4 * random(1, 20, 2000).float()
    exact = kd_loss(s.double(), t.double(), backend=here(backend))
    torch.testing.assert_close(kd_loss(s, t, backend=here(backend)).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_undefined_distributions_give_nan(backend):
    x = random(1, 2, 50).float()
    for value in (math.nan, math.inf):
        for side in (0, 1):
            pair = [x.clone(), x.clone()]
            pair[side][0, 1, 7] = value
            assert kd_loss(*pair, backend=here(backend)).isnan(), (value, side)
    assert kd_loss(x, torch.full_like(x, -math.inf), backend=here(backend)).isnan()
    for layer_norm in (False, True):
        bad = x.clone()
        bad[0, 0, 3] = math.nan
        assert layerwise_mse([bad], [x], layer_norm=layer_norm, backend=here(backend)).isnan()


def test_large_vocabulary():
    s, t = 3 * random(1, 2, 300_000).float(), 3 * random(1, 2, 300_000).float()
    exact = values_and_gradients(lambda a, b: kd_loss(a, b, backend="reference"), [s, t], torch.float64)
    got = values_and_gradients(lambda a, b: kd_loss(a, b, backend=here()), [s, t])
    for g, e in zip(got, exact):
        torch.testing.assert_close(g.double(), e, rtol=2e-5, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    """Slices, transposes and expansions give what contiguous copies give, in any number of dimensions."""
    big = random(2, 3, 20, 3 * 24, dtype=dtype)
    for view in (
        big[..., 5:45],
        big[..., ::2],
        big.mT,
        big[:, :, :1].expand(-1, -1, 20, -1),
        big[..., :1].expand(-1, -1, -1, 24),
        big[0, 0],
        big[0],
        big.transpose(0, 2),
    ):
        other = random(*view.shape, dtype=dtype)
        for pair in ((view, other), (other, view)):
            for loss in (
                lambda s, t: layerwise_mse([s], [t], layer_norm=True, backend=here()),
                lambda s, t: kd_loss(s, t, backend=here()),
            ):
                value = loss(*pair)
                torch.testing.assert_close(value, loss(*(x.contiguous() for x in pair)), rtol=0, atol=0)
                grads = []
                for make in (lambda x: x.detach(), lambda x: x.detach().contiguous()):
                    s, t = (make(x).requires_grad_() for x in pair)
                    grads.append(torch.autograd.grad(loss(s, t), (s, t)))
                torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_rows_far_apart():
    """Offsets beyond 32 bits: rows 2^31 elements apart. Memory between them is never touched."""
    far = torch.empty(2**31 + 8, dtype=torch.bfloat16).as_strided((1, 2, 8), (0, 2**31, 1))
    far.copy_(random(1, 2, 8))
    near, other = far.contiguous(), random(1, 2, 8)
    for x in ((far, other.bfloat16()), (other, far.float())):
        same = tuple(near if y is far else y for y in x)
        assert layerwise_mse([x[0]], [x[1]], backend=here()) == layerwise_mse([same[0]], [same[1]], backend=here())
        assert kd_loss(*x, backend=here()) == kd_loss(*same, backend=here())


@pytest.mark.parametrize("width, first", [(256, 0), (250, 0), (256, 1)])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_large_gradients_are_written_past_the_caches(width, first, layer_norm):
    """From 16 MiB on gradients are streamed: aligned rows or not, the values are the same."""
    s, t = random(1, 9000, width + first).float()[..., first:], random(1, 9000, width).float()

    def gradient(s, t):
        return values_and_gradients(lambda x: layerwise_mse([x, x], [t, t], layer_norm=layer_norm), [s])[1]

    few = slice(8990, None)
    torch.testing.assert_close(gradient(s, t)[:, few] * 900, gradient(s[:, few], t[:, few]), rtol=1e-6, atol=1e-12)


def test_deterministic_for_any_number_of_threads():
    tensors = [random(3, 200, d).float() for d in (300, 300, 1500, 1500)]

    def loss(s, t, a, b):
        return distillation_loss([s, s], [t, t], a, b, layer_norm=True, backend=here())

    alike_for_threads(lambda: values_and_gradients(loss, tensors))


def test_gradcheck():
    tensors = [random(2, 4, d).requires_grad_() for d in (6, 6, 5, 5)]
    mask, weights = torch.tensor([4, 2]), random(1).requires_grad_()

    def loss(s, t, a, b, w):
        options = dict(mask=mask, logits_mask=mask, layer_norm=True, weights=w, backend=here())
        return distillation_loss([s], [t], a, b, **options), layerwise_mse([s], [t], mask=mask)

    assert torch.autograd.gradcheck(loss, (*tensors, weights))


def test_only_wanted_gradients_are_made():
    s, t = random(1, 4, 6).requires_grad_(), random(1, 4, 6)
    none = random(0, dtype=torch.float32)
    one = torch.ones(1, dtype=torch.float64)
    statistics = random(0, 6)
    arguments = (one, one, [s], [t], None, False, None, None, None, 2.0, statistics)
    backward = dispatch.operator("distillation_loss_backward", here())
    found = backward(*arguments, True, False, False, False)
    assert found[0][0].shape == s.shape and found[1][0].shape == none.shape and found[2].shape == none.shape


def test_second_derivative_is_refused():
    s = random(1, 4, 6).requires_grad_()
    for loss in (layerwise_mse([s], [random(1, 4, 6)], backend=here()), kd_loss(s, random(1, 4, 6), backend=here())):
        (grad,) = torch.autograd.grad(loss, s, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@pytest.mark.parametrize("mask", [None, torch.tensor([5, 2]), torch.rand(2, 5) < 0.5])
def test_opcheck(mask):
    mask = None if mask is None else mask.to(torch.get_default_device())
    s, t = ([random(2, 5, d).requires_grad_() for d in (6, 4)] for _ in range(2))
    a, b = random(2, 5, 7).requires_grad_(), random(2, 5, 7).requires_grad_()
    for arguments in ((s, t, mask, True, a, b, mask, 2.0), (s, t, mask, False, None, None, None, 2.0)):
        torch.library.opcheck(torch.ops.linconv.distillation_loss.default, arguments)
    logits = random(3, 7), random(3, 7)
    known = torch.ops.linconv.kd_statistics(*logits, None, 2.0)
    torch.library.opcheck(torch.ops.linconv.kd_statistics.default, (*logits, known, 2.0))
    torch.library.opcheck(torch.ops.linconv.kd_gradient.default, (*logits, known, random(3), 2.0))


def test_compile_and_checkpoint():
    tensors = [random(2, 20, d).float() for d in (16, 16, 9, 9)]
    # Made out here: compiled by torch 2.11, torch.tensor takes no notice of a default device.
    lengths = torch.tensor([20, 11])

    def loss(s, t, a, b):
        return distillation_loss(
            [s * 2, s], [t, t], a, b, mask=lengths, layer_norm=True, weights=[1.0, 2.0], backend=here()
        )

    def checkpointed(*x):
        return torch.utils.checkpoint.checkpoint(loss, *x, use_reentrant=False)

    plain = values_and_gradients(loss, tensors)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for other in (values_and_gradients(compiled, tensors), values_and_gradients(checkpointed, tensors)):
        torch.testing.assert_close(other, plain, rtol=0, atol=0)


# ---- From the hidden states before the last projection


def linear_inputs(rows, d_s, d_t, classes, dtype=torch.float64):
    return [random(*shape, dtype=dtype) for shape in ((rows, d_s), (classes, d_s), (rows, d_t), (classes, d_t))]


def full(hidden_s, weight_s, hidden_t, weight_t, mask=None, temperature=2.0):
    return kd_loss(
        hidden_s @ weight_s.T, hidden_t @ weight_t.T, mask=mask, temperature=temperature, backend="reference"
    )


@pytest.mark.parametrize("rows, classes", [(0, 5), (1, 2), (7, 1030), (1030, 40)])
@pytest.mark.parametrize("masked", [False, True])
def test_linear_oracle(rows, classes, masked):
    tensors, mask = linear_inputs(rows, 6, 4, classes), torch.rand(rows) < 0.7 if masked else None
    for backend in BACKENDS:
        fresh, other = leaves(tensors), leaves(tensors)
        got = linear_kd_loss(*fresh, mask=mask, temperature=3.0, backend=here(backend))
        wanted = full(*other, mask=mask, temperature=3.0)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-13)
        grads = torch.autograd.grad(got, fresh[:2], materialize_grads=True)
        torch.testing.assert_close(grads, torch.autograd.grad(wanted, other[:2]), rtol=1e-9, atol=1e-13)


def test_linear_is_more_exact_than_rounded_logits():
    tensors = linear_inputs(300, 64, 96, 2100, torch.bfloat16)
    found = {}
    for name, dtype, loss in (
        ("exact", torch.float64, full),
        ("rounded", None, full),
        ("ours", None, lambda *x: linear_kd_loss(*x, backend=here())),
    ):
        fresh = leaves(tensors, dtype)
        found[name] = torch.autograd.grad(loss(*fresh), fresh[:2])
    for ours, rounded, exact in zip(found["ours"], found["rounded"], found["exact"]):
        # Both end in bfloat16; it is the sum of errors that tells.
        assert (ours.double() - exact).norm() < (rounded.double() - exact).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", ["narrow", "float32"])
def test_linear_of_narrow_products(dtype, weight, monkeypatch):
    """Sides in one narrow dtype are multiplied as they are, with sums in float32."""
    monkeypatch.setattr(linear, "TILE_OF_CPU", (128, 256))
    tensors = linear_inputs(300, 64, 96, 2100, dtype)
    if weight == "float32":
        tensors[1::2] = [t.float() for t in tensors[1::2]]
    if dispatch.compiled("linear_out"):
        assert linear._multiplied_as(*tensors[:2]) == tensors[1].dtype
    mask = torch.arange(300) % 5 != 0
    found = {}
    for name, precision, loss in (
        ("exact", torch.float64, full),
        ("torch's", dtype, full),
        ("ours", None, lambda *x, **options: linear_kd_loss(*x, **options, backend=here())),
    ):
        fresh = leaves(tensors, precision)
        value = loss(*fresh, mask=mask)
        found[name] = [value.detach(), *torch.autograd.grad(value, fresh[:2])]
    for i, factor in enumerate((2, 3, 3)):
        no_worse_than_torch(found["ours"][i], found["torch's"][i], found["exact"][i], factor)
    assert [g.dtype for g in found["ours"][1:]] == [t.dtype for t in tensors[:2]]


def test_linear_padded_is_alone():
    tensors = [t.float() for t in linear_inputs(50, 24, 16, 1100)]
    n, mask = 37, torch.arange(50) < 37
    padded = [t.clone() for t in tensors]
    padded[0][n:], padded[2][n:] = torch.nan, torch.inf
    values = []
    for inputs, options in ((padded, {"mask": mask}), ([t[:n] if len(t) == 50 else t for t in tensors], {})):
        fresh = leaves(inputs)
        loss = linear_kd_loss(*fresh, **options, backend=here())
        values.append([loss.detach(), *torch.autograd.grad(loss, fresh[:2])])
    same_bits(values[0][0], values[1][0])
    same_bits(values[0][2], values[1][2])
    same_bits(values[0][1][:n], values[1][1])
    assert not values[0][1][n:].any()


def test_linear_gradcheck_opcheck_compile():
    tensors = linear_inputs(5, 4, 3, 7)
    fresh = leaves(tensors[:2])
    assert torch.autograd.gradcheck(lambda h, w: linear_kd_loss(h, w, *tensors[2:], backend=here()), fresh)
    op = torch.ops.linconv.linear_kd_loss.default
    torch.library.opcheck(op, (*fresh, *tensors[2:], None, 2.0))
    torch.library.opcheck(op, (*fresh, *tensors[2:], torch.rand(5) < 0.5, 2.0), test_utils=("test_schema",))
    compiled = torch.compile(linear_kd_loss, fullgraph=True, backend="aot_eager")
    for loss in (linear_kd_loss, compiled):
        again = leaves(tensors[:2])
        grads = torch.autograd.grad(loss(*again, *tensors[2:]), again)
        torch.testing.assert_close(grads, torch.autograd.grad(full(*fresh, *tensors[2:]), fresh))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"hidden_s": None}, TypeError, "hidden_s is NoneType"),
        ({"weight_s": torch.zeros(7, 5)}, ValueError, r"weight_s has shape \(7, 5\), wanted \(classes, d\)"),
        ({"weight_t": torch.zeros(8, 3)}, ValueError, r"weight_t has shape \(8, 3\)"),
        ({"hidden_t": torch.zeros(4, 3)}, ValueError, r"hidden_t has shape \(4, 3\)"),
        ({"temperature": 0}, ValueError, "temperature: got 0"),
        ({"temperature": float("inf")}, ValueError, "temperature: got inf; want a finite number above 0"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"mask: got bool of shape \(4,\)"),
    ],
)
def test_linear_bad_arguments(change, error, message):
    names = ("hidden_s", "weight_s", "hidden_t", "weight_t")
    given = dict(zip(names, (t.float() for t in linear_inputs(5, 4, 3, 7))))
    change = {k: v.to(torch.get_default_device()) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(error, match=message):
        linear_kd_loss(**{**given, **change})


@pytest.mark.parametrize(
    "mask, error, message",
    [
        (torch.ones(2, 4, dtype=torch.bool), ValueError, r"mask: got bool of shape \(2, 4\); want \(2, 5\)"),
        (torch.ones(2, 5), TypeError, "mask: got torch.float32; want bool"),
        (torch.tensor([5, 1, 1]), ValueError, r"mask: got integers of shape \(3,\); want lengths of shape \(2,\)"),
        ([True, False], TypeError, "mask: got list; want a bool or integer tensor"),
        (torch.ones(2, 5, dtype=torch.bool).to_sparse(), ValueError, "mask: got layout torch.sparse_coo"),
    ],
)
def test_a_wrong_mask_has_the_name_it_was_given_by(mask, error, message):
    mask = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(torch.get_default_device()), mask)
    logits = torch.zeros(2, 5, 3)
    with pytest.raises(error, match=f"^{message}"):
        kd_loss(logits, logits, mask=mask)
    with pytest.raises(error, match=f"^logits_{message}"):
        distillation_terms(student_logits=logits, teacher_logits=logits, logits_mask=mask)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(weights="ab"), TypeError, "weights: got str"),
        (dict(weights=["a"]), TypeError, "weights: got list"),
        (dict(weights=torch.ones(1, device="meta")), ValueError, "weights: got device meta"),
        (dict(weights=torch.ones(1, device="cpu").to_sparse()), ValueError, "weights: got layout torch.sparse_coo"),
        (dict(weights=torch.ones(1, dtype=torch.complex64)), TypeError, "weights: got torch.complex64; want real"),
        (dict(weights=[1.0, 2.0]), ValueError, r"weights: got shape \(2,\); want \(1,\)"),
        (dict(student=0.5), TypeError, "student: got float; want a sequence of tensors"),
        (dict(teacher=0.5), TypeError, "teacher: got float; want a sequence of tensors"),
        (dict(student=torch.tensor(0.5)), TypeError, "student: got Tensor; want a sequence of tensors"),
    ],
)
def test_bad_layers(change, error, message):
    states = {"student": [torch.zeros(2, 5, 3)], "teacher": [torch.zeros(2, 5, 3)]}
    logits = {"student_logits": torch.zeros(2, 3), "teacher_logits": torch.zeros(2, 3)}
    for loss in (layerwise_mse, lambda **given: distillation_loss(**given, **logits)):
        with pytest.raises(error, match=message):
            loss(**{**states, **change})


@pytest.mark.parametrize("name", ["student_logits", "teacher_logits"])
def test_bad_logits(name):
    logits = {n: torch.zeros(2, 3) for n in ("student_logits", "teacher_logits")}
    with pytest.raises(ValueError, match=f"{name}: got layout torch.sparse_coo; want torch.strided"):
        kd_loss(**{**logits, name: logits[name].to_sparse()})
    nested = torch.nested.nested_tensor([torch.zeros(3)] * 2, layout=torch.strided)
    with pytest.raises(ValueError, match=f"{name}: got layout nested; want torch.strided"):
        kd_loss(**{**logits, name: nested})
    for dtype in (torch.int64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=f"{name}: got {dtype}; want one of torch.float32"):
            kd_loss(**{**logits, name: logits[name].to(dtype)})
    for temperature in (0, float("inf"), float("nan"), "2"):
        with pytest.raises(ValueError, match="temperature: got .*; want a finite number above 0"):
            kd_loss(**logits, temperature=temperature)


LOGITS = torch.zeros(2, 5, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(teacher=[]), "teacher has 0 tensors, wanted 1"),
        (dict(student=[torch.zeros(2, 3)], teacher=[torch.zeros(2, 3)]), "student has 2 dimensions, wanted 3"),
        (dict(teacher=[torch.zeros(2, 5, 3)]), "teacher has size 3 in dimension 2"),
        (dict(mask=torch.ones(2, 4, dtype=torch.bool)), r"mask is \(2, 4\), wanted \(2, 5\)"),
        (dict(student_logits=LOGITS), "one is absent"),
        (
            dict(student_logits=torch.zeros(2, 5, 3), teacher_logits=torch.zeros(2, 5, 3), temperature=0.0),
            "temperature",
        ),
    ],
)
def test_operator_checks_what_it_reads(call, message):
    check_of_operator(message, **call)


@pytest.mark.skipif(torch.cuda.is_available(), reason="only a host reads lengths before it runs")
def test_operator_refuses_lengths_outside_the_tensor():
    check_of_operator(r"seq_lens\[0\] is 6, wanted 0 to 5", mask=torch.tensor([6, 1]))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(hidden_s=torch.zeros(())), r"hidden_s has shape \(\), wanted \(rows, d\)"),
        (dict(hidden_s=torch.zeros(2, 2, 4)), r"hidden_s has shape \(2, 2, 4\), wanted \(rows, d\)"),
        (dict(hidden_t=torch.zeros(3, 3)), r"hidden_t has shape \(3, 3\), wanted the rows of hidden_s"),
        (
            dict(weight_s=torch.zeros(0, 4), weight_t=torch.zeros(0, 3)),
            "weight_t has shape .* wanted at least one class",
        ),
        (dict(mask=torch.ones(4, dtype=torch.bool)), r"mask: got bool of shape \(4,\); want \(5,\)"),
        (dict(mask=torch.ones(5, 2, dtype=torch.bool)), r"mask: got bool of shape \(5, 2\); want \(5,\)"),
        (dict(grad=torch.zeros(2)), r"grad has shape \(2,\), wanted \(1,\)"),
        (dict(statistics=torch.zeros(4, 6).double()), r"statistics has shape \(4, 6\), wanted \(rows that count, 6\)"),
    ],
)
def test_operator_of_hidden_states_checks_what_it_computes_with(change, message):
    names = ("hidden_s", "weight_s", "hidden_t", "weight_t")
    arguments = dict(zip(names, (torch.zeros(size) for size in ((5, 4), (7, 4), (5, 3), (7, 3)))))
    arguments |= dict(mask=None, temperature=2.0)
    _, statistics = torch.ops.linconv.linear_kd_loss(**arguments)
    of_backward = dict(grad=torch.ones(1), statistics=statistics)
    change = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(torch.get_default_device()), change)
    if not change.keys() & of_backward.keys():
        with pytest.raises(ValueError, match=message):
            torch.ops.linconv.linear_kd_loss(**{**arguments, **change})
    with pytest.raises(ValueError, match=message):
        torch.ops.linconv.linear_kd_loss_backward(**{**arguments, **of_backward, **change})


def check_of_operator(message, **change):
    arguments = dict(
        student=[torch.zeros(2, 5, 4)],
        teacher=[torch.zeros(2, 5, 4)],
        mask=None,
        layer_norm=False,
        student_logits=None,
        teacher_logits=None,
        logits_mask=None,
        temperature=2.0,
    )
    change = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(torch.get_default_device()), change)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.linconv.distillation_loss(**{**arguments, **change})
