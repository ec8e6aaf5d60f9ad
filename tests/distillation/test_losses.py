import math

import pytest
import torch
import torch.nn.functional as F

from linconv.ops.distillation_loss import distillation_loss, kd_loss, layerwise_mse


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def states(layers=3, batch=2, length=5, width=4, seed=0, **kwargs):
    return [randn(batch, length, width, seed=seed + i, **kwargs) for i in range(layers)]


@pytest.mark.parametrize("layer_norm", [False, True])
def test_layerwise_mse_is_the_mean_over_valid_frames_and_width(layer_norm):
    student, teacher, lengths = states(seed=0), states(seed=10), torch.tensor([5, 2])
    want = []
    for s, t in zip(student, teacher):
        rows = [(s[b, i], t[b, i]) for b in range(2) for i in range(lengths[b])]
        if layer_norm:
            rows = [[(x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() for x in pair] for pair in rows]
        want.append(sum((a - b).square().sum() for a, b in rows) / (7 * 4))
    want = torch.stack(want)
    weights = torch.tensor([1.0, 0.0, 3.0])
    loss = {"mask": lengths, "layer_norm": layer_norm}
    torch.testing.assert_close(layerwise_mse(student, teacher, **loss, reduction="none"), want)
    torch.testing.assert_close(layerwise_mse(student, teacher, **loss), want.mean())
    torch.testing.assert_close(layerwise_mse(student, teacher, **loss, reduction="sum"), want.sum())
    weighted = layerwise_mse(student, teacher, **loss, weights=weights)
    torch.testing.assert_close(weighted, (weights * want).mean())
    torch.testing.assert_close(weighted, layerwise_mse(student, teacher, **loss, weights=[1.0, 0.0, 3.0]))


@pytest.mark.parametrize("scale_by_t2", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kd_loss_is_kl_of_the_softened_distributions(temperature, scale_by_t2):
    student, teacher, lengths = randn(2, 5, 7), randn(2, 5, 7, seed=1), torch.tensor([3, 5])
    want = 0
    for b in range(2):
        for i in range(lengths[b]):
            p, q = (F.softmax(x[b, i] / temperature, -1) for x in (teacher, student))
            want += (p * (p / q).log()).sum()
    want = want / 8 * (temperature**2 if scale_by_t2 else 1)
    got = kd_loss(student, teacher, temperature=temperature, mask=lengths, scale_by_t2=scale_by_t2)
    torch.testing.assert_close(got, want)


def test_distillation_loss_is_the_weighted_sum():
    student, teacher, s, t = states(seed=0), states(seed=10), randn(2, 7), randn(2, 7, seed=1)
    mask, clips = torch.tensor([5, 2]), torch.tensor([True, False])
    options = {"weights": [1.0, 2.0, 3.0], "layer_norm": True, "reduction": "sum"}
    got = distillation_loss(
        student, teacher, s, t, alpha_kd=0.5, alpha_ld=15.0, temperature=3.0, mask=mask, logits_mask=clips, **options
    )
    want = 15.0 * layerwise_mse(student, teacher, mask=mask, **options) + 0.5 * kd_loss(
        s, t, temperature=3.0, mask=clips
    )
    torch.testing.assert_close(got, want)


def test_lengths_and_bool_mask_agree():
    student, teacher, lengths = states(seed=0), states(seed=10), torch.tensor([5, 2], dtype=torch.int32)
    mask = torch.arange(5) < lengths[:, None]
    assert layerwise_mse(student, teacher, mask=mask) == layerwise_mse(student, teacher, mask=lengths)
    assert kd_loss(student[0], teacher[0], mask=mask) == kd_loss(student[0], teacher[0], mask=lengths)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_masked_rows_reach_neither_loss_nor_gradient(poison, layer_norm):
    lengths, clean = torch.tensor([5, 2]), {}
    for value in (0.0, poison):
        student, teacher = states(layers=1, seed=0), states(layers=1, seed=10)
        for x in student + teacher:
            x[1, 2:] = value
            x.requires_grad_()
        loss = layerwise_mse(student, teacher, mask=lengths, layer_norm=layer_norm)
        loss = loss + kd_loss(student[0], teacher[0], mask=lengths)
        clean[value] = (loss, *torch.autograd.grad(loss, student + teacher))
    for got, want in zip(clean[poison], clean[0.0]):
        assert torch.equal(got, want)
    assert all((g[1, 2:] == 0).all() and (g[1, :2] != 0).any() for g in clean[poison][1:])


def test_no_valid_row_is_zero():
    x = randn(2, 5, 4).requires_grad_()
    loss = layerwise_mse([x], [x * 2], mask=torch.tensor([0, 0])) + kd_loss(x, x * 2, mask=torch.tensor([0, 0]))
    assert loss == 0
    assert (torch.autograd.grad(loss, x)[0] == 0).all()
    assert layerwise_mse([randn(0, 5, 4)], [randn(0, 5, 4)]) == 0
    assert kd_loss(randn(2, 0, 4), randn(2, 0, 4)) == 0


def test_gradcheck():
    student, teacher, lengths = states(layers=2, seed=0), states(layers=2, seed=10), torch.tensor([5, 2])
    inputs = [x.requires_grad_() for x in student + teacher]

    def losses(*xs):
        return (
            layerwise_mse(xs[:2], xs[2:], mask=lengths, layer_norm=True),
            layerwise_mse(xs[:2], xs[2:], weights=[1.0, 2.0], reduction="none"),
            kd_loss(xs[0], xs[2], mask=lengths, temperature=3.0),
        )

    assert torch.autograd.gradcheck(losses, inputs)


def test_minus_infinity_is_probability_zero():
    teacher, student = randn(3, 5, seed=1), randn(3, 5)
    teacher[:, 4] = student[:, 4] = -math.inf
    want = kd_loss(student[:, :4], teacher[:, :4])
    student.requires_grad_()
    got = kd_loss(student, teacher)
    torch.testing.assert_close(got, want)
    grad = torch.autograd.grad(got, student)[0]
    assert grad.isfinite().all() and (grad[:, 4] == 0).all()

    only_teacher = student.detach().clone()
    only_teacher[:, 4] = 0.0
    assert kd_loss(only_teacher, teacher).isfinite()
    assert kd_loss(student, only_teacher) == math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_are_computed_in_fp32(dtype):
    student, teacher = states(seed=0, dtype=dtype), states(seed=10, dtype=dtype)
    wide = [[x.float() for x in side] for side in (student, teacher)]
    got = layerwise_mse(student, teacher, layer_norm=True)
    assert got.dtype == torch.float32 and got == layerwise_mse(*wide, layer_norm=True)
    assert kd_loss(student[0], teacher[0]) == kd_loss(wide[0][0], wide[1][0])
    big = [torch.full((1, 1, 4), 6e4, dtype=dtype)], [torch.full((1, 1, 4), -6e4, dtype=dtype)]
    assert layerwise_mse(*big).isfinite()


def test_strides_do_not_matter():
    student, teacher = randn(4, 5, 2), randn(4, 5, 2, seed=1)
    views = [student.permute(2, 1, 0)], [teacher.permute(2, 1, 0)]
    dense = [[x.contiguous() for x in side] for side in views]
    torch.testing.assert_close(layerwise_mse(*views), layerwise_mse(*dense))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student": []}, ValueError, "student: got no hidden states"),
        ({"teacher": states(layers=2)}, ValueError, "teacher: got 2 hidden states; want 3"),
        ({"teacher": states(width=3)}, ValueError, r"teacher\[0\]: got shape \(2, 5, 3\); want \(2, 5, 4\)"),
        ({"teacher": [[1.0]] * 3}, TypeError, r"teacher\[0\]: got list"),
        ({"student": [x.long() for x in states()]}, TypeError, r"student\[0\]: got torch.int64"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"mask: got bool of shape \(2, 4\); want \(2, 5\)"),
        ({"mask": torch.ones(2, 5)}, TypeError, "mask: got torch.float32"),
        ({"mask": torch.ones(3, dtype=torch.int64)}, ValueError, r"mask: got integers of shape \(3,\)"),
        ({"mask": [5, 2]}, TypeError, "mask: got list"),
        ({"weights": [1.0, 2.0]}, ValueError, r"weights: got shape \(2,\); want \(3,\)"),
        ({"reduction": "median"}, ValueError, "reduction: got 'median'; want one of mean, sum, none"),
    ],
)
def test_layerwise_mse_names_the_wrong_argument(change, error, message):
    with pytest.raises(error, match=message):
        layerwise_mse(**{"student": states(), "teacher": states(), **change})


def test_kd_loss_names_the_wrong_argument():
    with pytest.raises(ValueError, match="temperature: got 0"):
        kd_loss(randn(2, 3), randn(2, 3), temperature=0)
    with pytest.raises(ValueError, match=r"teacher_logits: got shape \(2, 4\); want \(2, 3\)"):
        kd_loss(randn(2, 3), randn(2, 4))
    with pytest.raises(ValueError, match="mask: got integers .* want a bool mask here"):
        kd_loss(randn(2, 3), randn(2, 3), mask=torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="reduction: got 'none'"):
        distillation_loss(states(), states(), randn(2, 3), randn(2, 3), reduction="none")
