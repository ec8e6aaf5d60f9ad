"""Errors of the argument checks that the operators share."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from linconv import ops
from linconv.ops import checks

CPU = torch.device("cpu")


def bounds(seq_lens=None, cu_seqlens=None, batch=1):
    checks.sequence_bounds(seq_lens, cu_seqlens, batch, 5, CPU)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_good_bounds(dtype):
    bounds()
    bounds(seq_lens=torch.tensor([0, 5, 3], dtype=dtype), batch=3)
    bounds(seq_lens=torch.empty(0, dtype=dtype), batch=0)
    bounds(cu_seqlens=torch.tensor([0, 2, 2, 5], dtype=dtype))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(seq_lens=[5]), TypeError, "seq_lens is list, wanted a torch.Tensor"),
        (dict(seq_lens=torch.tensor([5.0])), TypeError, "seq_lens has dtype torch.float32, wanted torch.int32"),
        (dict(seq_lens=torch.tensor(5)), ValueError, "seq_lens has shape (), wanted one dimension"),
        (dict(seq_lens=torch.tensor([5, 5])), ValueError, "seq_lens has shape (2,), wanted (batch,) = (1,)"),
        (dict(seq_lens=torch.tensor([6])), ValueError, "seq_lens holds 6, wanted 0 to L = 5"),
        (dict(seq_lens=torch.tensor([-1])), ValueError, "seq_lens holds -1, wanted 0 to L = 5"),
        (dict(seq_lens=torch.tensor([5], device="meta")), ValueError, "seq_lens is on meta, wanted cpu"),
        (dict(seq_lens=torch.tensor([5]), cu_seqlens=torch.tensor([0, 5])), ValueError, "both given"),
        (dict(cu_seqlens=torch.tensor([0, 5]), batch=2), ValueError, "cu_seqlens is given with a batch of 2"),
        (dict(cu_seqlens=torch.tensor([], dtype=torch.int64)), ValueError, "cu_seqlens is empty"),
        (dict(cu_seqlens=torch.tensor([0, 4])), ValueError, "cu_seqlens runs from 0 to 4, wanted 0 to L = 5"),
        (dict(cu_seqlens=torch.tensor([1, 5])), ValueError, "cu_seqlens runs from 1 to 5, wanted 0 to L = 5"),
        (dict(cu_seqlens=torch.tensor([0, 4, 3, 5])), ValueError, "cu_seqlens is [0, 4, 3, 5], wanted values"),
    ],
)  # fmt: skip
def test_bad_bounds(arguments, error, message):
    with pytest.raises(error) as raised:
        bounds(**arguments)
    assert message in str(raised.value)


def test_values_are_not_read_where_there_are_none():
    """Tracing runs on tensors without data: only their types and shapes are checked there."""
    with FakeTensorMode():
        seq_lens, cu_seqlens = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
        bounds(seq_lens=seq_lens, batch=3)
        bounds(cu_seqlens=cu_seqlens)
        with pytest.raises(ValueError, match=r"seq_lens has shape \(3,\), wanted \(batch,\) = \(2,\)"):
            bounds(seq_lens=seq_lens, batch=2)


def test_tensors():
    x, double = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float64)
    checks.floating_tensor("x", x)
    with pytest.raises(TypeError, match="x is float, wanted a torch.Tensor"):
        checks.floating_tensor("x", 1.0)
    with pytest.raises(TypeError, match="x has dtype torch.int64, wanted one of torch.float32"):
        checks.floating_tensor("x", torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="x has layout torch.sparse_coo, wanted torch.strided"):
        checks.floating_tensor("x", x.to_sparse())
    for layout in (torch.strided, torch.jagged):
        with pytest.raises(ValueError, match="x has layout nested, wanted torch.strided"):
            checks.floating_tensor("x", torch.nested.nested_tensor([x, x], layout=layout))
    checks.shape("x", x, (2, None), "(batch, L)")
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\), wanted \(batch, L\) = \(any, 4\)"):
        checks.shape("x", x, (None, 4), "(batch, L)")
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\), wanted \(L\) = \(2\)"):
        checks.shape("x", x, (2,), "(L)")
    checks.like("y", x.bfloat16(), "x", x)
    with pytest.raises(TypeError, match="y is torch.float64 and x is torch.float32, wanted torch.float64 for all"):
        checks.like("y", double, "x", x)
    with pytest.raises(ValueError, match="y is on meta, wanted cpu as x"):
        checks.like("y", x.to("meta"), "x", x)


def scan():
    x, dt, A, B = torch.ones(1, 4, 2, 3), torch.ones(1, 4, 2), -torch.ones(2), torch.ones(1, 4, 1, 3)
    return x, dt, A, B, B


def selective():
    x, A, B = torch.ones(1, 4, 2), -torch.ones(2, 3), torch.ones(1, 4, 1, 3)
    return x, x, A, B, B


def rows():
    return (torch.ones(1, 4, 3), torch.zeros(1, 4, 3))


CALLS = {
    "ssd": lambda **options: ops.ssd(*scan(), **options),
    "bidirectional_ssd": lambda **options: ops.bidirectional_ssd(*scan(), **options),
    "selective_scan": lambda **options: ops.selective_scan(*selective(), **options),
    "short_conv": lambda **options: ops.short_conv(torch.ones(1, 4, 3), torch.ones(3, 2), **options),
    "gated_rms_norm": lambda **options: ops.gated_rms_norm(*rows(), torch.ones(3), **options),
    "layerwise_mse": lambda **options: ops.layerwise_mse(*([x] for x in rows()), **options),
    "kd_loss": lambda **options: ops.kd_loss(*rows(), **options),
    "distillation_loss": lambda **options: ops.distillation_loss(*([x] for x in rows()), *rows(), **options),
    "distillation_terms": lambda **options: ops.distillation_terms(*([x] for x in rows()), *rows(), **options),
    "linear_kd_loss": lambda **options: ops.linear_kd_loss(*2 * (torch.ones(4, 3), torch.ones(5, 3)), **options),
    "linformer_attention": lambda **options: ops.linformer_attention(
        *torch.ones(3, 1, 2, 4, 3), torch.ones(4, 2), **options
    ),
    "linformer_self_attention": lambda **options: ops.linformer_self_attention(
        torch.ones(1, 4, 4), *3 * (torch.ones(4, 4), None), torch.ones(4, 2), num_heads=2, **options
    ),
}


@pytest.mark.parametrize("value", ["False", 1, None, [True], torch.tensor(True)])
@pytest.mark.parametrize(
    "operator, name",
    [
        ("ssd", "dt_softplus"),
        ("ssd", "return_final_states"),
        ("ssd", "reverse"),
        ("bidirectional_ssd", "dt_softplus"),
        ("selective_scan", "dt_softplus"),
        ("selective_scan", "return_final_states"),
        ("selective_scan", "reverse"),
        ("short_conv", "reverse"),
        ("layerwise_mse", "layer_norm"),
        ("kd_loss", "scale_by_t2"),
        ("distillation_loss", "layer_norm"),
        ("distillation_loss", "scale_by_t2"),
        ("distillation_terms", "layer_norm"),
        ("linear_kd_loss", "scale_by_t2"),
        ("linformer_attention", "normalize"),
        ("linformer_self_attention", "rewrite"),
    ],
)
def test_a_flag_is_a_bool(operator, name, value):
    """The text "False" is true, so nothing is taken by its truth."""
    CALLS[operator](**{name: True})
    if name == "rewrite" and value is None:  # which has a meaning of its own
        return
    with pytest.raises(TypeError, match=f"^{name} is .*, wanted a bool"):
        CALLS[operator](**{name: value})


@pytest.mark.parametrize(
    "value, error", [("1", TypeError), (None, TypeError), (1j, TypeError), (float("nan"), ValueError),
                     (float("inf"), ValueError), (10**400, ValueError)]
)  # fmt: skip
@pytest.mark.parametrize(
    "operator, name",
    [
        ("gated_rms_norm", "eps"),
        ("distillation_loss", "alpha_kd"),
        ("distillation_loss", "alpha_ld"),
        ("linformer_attention", "scale"),
        ("linformer_self_attention", "scale"),
    ],
)
def test_a_number_is_finite(operator, name, value, error):
    CALLS[operator](**{name: 1})
    CALLS[operator](**{name: 10**30})  # more than an int64 holds
    if name == "scale" and value is None:
        return
    with pytest.raises(error, match=f"^{name} is .*, wanted a f"):
        CALLS[operator](**{name: value})


@pytest.mark.parametrize("operator", ["ssd", "bidirectional_ssd"])
def test_a_limit_is_a_number_that_a_float_holds(operator):
    CALLS[operator](dt_limit=(-float("inf"), float("inf")))
    with pytest.raises(ValueError, match="^dt_limit is 10*, wanted a finite number"):
        CALLS[operator](dt_limit=(0, 10**400))


@pytest.mark.parametrize("operator", ["kd_loss", "distillation_loss", "distillation_terms", "linear_kd_loss"])
def test_a_temperature_is_a_number_that_a_float_holds(operator):
    CALLS[operator](temperature=10**30, **{} if operator == "distillation_terms" else {"scale_by_t2": True})
    with pytest.raises(ValueError, match="^temperature: got 10*; want a finite number above 0"):
        CALLS[operator](temperature=10**400)


def test_a_check_that_passed_is_not_made_again():
    """But for arguments that are not alike, and each time where it fails."""
    made = []

    @checks.remembered
    def check(x, n, options=()):
        made.append((x.shape, n))
        checks.shape("x", x, (n,), "(n,)")
        return len(made)

    x = torch.ones(3)
    assert check(x, 3) == check(torch.zeros(3), 3) == 1
    for other in (x.double(), x.to("meta"), x.to_sparse()):
        before = len(made)
        assert check(other, 3) == check(other, 3) == before + 1
    for _ in range(2):
        before = len(made)
        with pytest.raises(ValueError, match=r"x has shape \(3,\), wanted \(n,\) = \(4\)"):
            check(x, 4)
        assert len(made) == before + 1
    before = len(made)
    check(x, 3.0)  # equal to 3 but of another type: what is wanted of it may be an int
    check(x, 3, {})  # has no hash
    check(x, 3, {})
    with pytest.raises(ValueError, match="x has layout nested"):
        checks.remembered(checks.tensor)("x", torch.nested.nested_tensor([x, x], layout=torch.strided))
    for options in ((0.0, 1.0), (0, 1.0), [0, 1.0], (0, (1.0,)), (0, (1,)), (False, (1,))):  # not alike, and once each
        check(x, 3, options)
        check(x, 3, options)
    assert len(made) == before + 3 + 6


def test_checks_do_not_remember_without_bound(monkeypatch):
    monkeypatch.setattr(checks, "MOST_REMEMBERED", 4)
    made = []
    check = checks.remembered(made.append)
    for n in range(9):
        check(n)
    check(8)
    assert made == list(range(9))
    check(0)
    assert made == [*range(9), 0]
