"""LinformerAttention against exact attention, the formula of the paper, and its own contract."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from linconv.conversion.families import SelfAttention
from linconv.mixers import LinformerAttention
from linconv.ops import dispatch

SHARING = ("none", "headwise", "key_value", "layerwise")


class Config:
    hidden_size, num_attention_heads, max_position_embeddings, attention_probs_dropout_prob = 16, 2, 40, 0.1


def attention(bias=True):
    names = ("query", "key", "value", "output")
    return SelfAttention({name: nn.Linear(16, 16, bias=bias or name != "key") for name in names})


def by_formula(mixer, u):
    """For sequences without padding."""
    q, k, v = (
        F.linear(u, p.weight, p.bias).unflatten(-1, (mixer.num_heads, -1)).transpose(1, 2)
        for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    length = u.shape[1]
    proj_v = mixer.proj_k if mixer.proj_v is None else mixer.proj_v
    k, v = (p[..., :length, :].mT @ x / length**0.5 for p, x in ((mixer.proj_k, k), (proj_v, v)))
    y = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    return mixer.out_proj(y.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("init", ["frames", "normal"])
@pytest.mark.parametrize("sharing", SHARING)
def test_is_the_formula(sharing, init):
    mixer = LinformerAttention(16, r=5, sharing=sharing, max_length=40, num_heads=2, init=init).double()
    u = torch.randn(2, 23, 16, dtype=torch.double)
    torch.testing.assert_close(mixer(u), by_formula(mixer, u))


def test_starts_as_the_attention_it_replaces():
    """With init="frames", r frames attend to each other exactly: the weights taken over are all that matters."""
    source = attention().double()
    mixer = LinformerAttention.from_attention(source, Config, r=12).double()
    u = torch.randn(3, 12, 16, dtype=torch.double)
    q, k, v = (getattr(source, n)(u).unflatten(-1, (2, 8)).transpose(1, 2) for n in ("query", "key", "value"))
    wanted = source.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(mixer.eval()(u), wanted)


def test_from_attention_takes_weights_sizes_and_what_is_frozen():
    source = attention(bias=False).to(torch.bfloat16)
    source.value.weight.requires_grad_(False)
    mixer = LinformerAttention.from_attention(source, Config, r=4)
    assert (mixer.num_heads, mixer.max_length, mixer.dropout) == (2, 40, 0.1)
    assert mixer.k_proj.bias is None and mixer.q_proj.bias is not None
    for own, taken in zip((mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.out_proj), source.children()):
        assert torch.equal(own.weight, taken.weight) and own.weight.data_ptr() != taken.weight.data_ptr()
        assert own.weight.requires_grad == taken.weight.requires_grad
    assert {p.dtype for p in mixer.parameters()} == {torch.bfloat16}
    options = LinformerAttention.from_attention(attention(), Config, num_heads=4, max_length=7, dropout=0.0)
    assert (options.num_heads, options.max_length, options.dropout) == (4, 7, 0.0)


def test_from_attention_takes_the_weights_that_a_parametrization_makes():
    source = attention(bias=False)
    for name, projection in source.named_children():
        nn.utils.parametrizations.weight_norm(projection, dim=0 if name == "query" else 1)
        projection.parametrizations.weight.original0.data.mul_(2)
    mixer = LinformerAttention.from_attention(source, Config, r=4)
    for own, taken in zip((mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.out_proj), source.children()):
        assert torch.equal(own.weight, taken.weight) and own.weight.is_leaf
        assert taken.bias is None if own.bias is None else torch.equal(own.bias, taken.bias)


def test_from_attention_wants_linear_layers():
    source = attention()
    source.key = nn.Sequential(source.key)
    with pytest.raises(
        TypeError, match="key is a Sequential, wanted a torch.nn.Linear, .* merge adapters before converting"
    ):
        LinformerAttention.from_attention(source, Config)


@pytest.mark.parametrize("sharing", SHARING)
def test_a_padded_row_is_what_it_is_alone_and_padding_gets_nothing(sharing):
    """Bit for bit, where both are in the same order of products: results, and gradients of hidden states."""
    mixer = LinformerAttention(16, r=5, sharing=sharing, max_length=200, num_heads=2, init="normal")
    lengths = torch.tensor([200, 0, 23, 67, 1])
    u, upstream = torch.randn(5, 200, 16, requires_grad=True), torch.randn(5, 200, 16)
    y = mixer(u, lengths)
    y.backward(upstream)
    for row, length in enumerate(lengths):
        assert torch.all(y[row, length:] == 0)
        assert torch.all(u.grad[row, length:] == 0)
        alone = u.detach()[row : row + 1, :length].requires_grad_()
        of_alone = mixer(alone)
        of_alone.backward(upstream[row : row + 1, :length])
        torch.testing.assert_close(y[row, :length], of_alone[0])
        torch.testing.assert_close(u.grad[row, :length], alone.grad[0])
        if dispatch.compiled("linear") and length != 1:  # a single frame alone is projected before it is summed
            assert torch.equal(y[row, :length], of_alone[0])
            assert torch.equal(u.grad[row, :length], alone.grad[0])
    for name, parameter in mixer.named_parameters():
        # k_proj.bias adds the same to each score of a query only where the sums of a projection's columns agree.
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1)])
def test_empty_and_shortest_inputs(shape):
    assert LinformerAttention(16, r=4, num_heads=2)(torch.randn(*shape, 16)).shape == (*shape, 16)


def test_layers_share_one_projection():
    layers = [LinformerAttention(16, r=4, sharing="layerwise", max_length=40, num_heads=2) for _ in range(3)]
    LinformerAttention.join(layers)
    model = nn.ModuleList(layers)
    assert [name for name in model.state_dict() if "proj_k" in name or "proj_v" in name] == ["0.proj_k"] + [
        name for name in model.state_dict() if "k_proj" in name and "proj_k" in name
    ]
    u = torch.randn(1, 9, 16)
    before = layers[2](u)
    with torch.no_grad():
        layers[0].proj_k.mul_(-0.5)
    assert not torch.equal(layers[2](u), before)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].proj_k.zero_()
    assert torch.equal(layers[2](u), model[2](u)) and not torch.equal(twin[2](u), model[2](u))


def test_dropout_is_for_training():
    mixer = LinformerAttention(16, r=4, num_heads=2, dropout=0.5)
    u = torch.randn(1, 20, 16)
    assert not torch.equal(mixer(u), mixer(u))
    assert torch.equal(mixer.eval()(u), mixer(u))


def test_flops_are_linear_and_never_below_attention_up_to_twice_r():
    mixer = LinformerAttention(768)
    assert mixer.flops(16384) - mixer.flops(8192) == mixer.flops(24576) - mixer.flops(16384)
    for sharing in SHARING[1:]:  # the products with scores and values alone
        length = 2 * mixer.r
        rest = LinformerAttention(768, sharing=sharing).flops(length) - 4 * length * mixer.r * 768
        assert rest + 4 * length * mixer.r * 768 > 4 * length * 768**2 + 2 * length * length * 768


def test_reset_draws_everything_afresh():
    mixer = LinformerAttention(16, r=4, num_heads=2, init="normal")
    before = {name: tensor.clone() for name, tensor in mixer.state_dict().items()}
    mixer.reset_parameters()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in mixer.state_dict().items())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(r="8"), "r is '8', wanted an int"),
        (dict(max_length=4.5), "max_length is 4.5, wanted an int"),
        (dict(num_heads="2"), "num_heads is '2', wanted an int"),
        (dict(dropout="no"), "dropout is 'no', wanted a number"),
        (dict(normalize="no"), "normalize is 'no', wanted a bool"),
    ],
)
def test_options_of_another_type_are_named(options, message):
    with pytest.raises(TypeError, match=message):
        LinformerAttention(16, **{"num_heads": 2, **options})


@pytest.mark.parametrize(
    "d_model, heads", [(400, None), (257, 1)], ids=["heads of 64 do not fit", "a head is too wide"]
)
def test_heads_that_do_not_fit_are_named(d_model, heads):
    came = "6, for heads of 64" if heads is None else heads
    match = f"num_heads is {came}, wanted a divisor of d_model = {d_model} for heads of at most 256"
    with pytest.raises(ValueError, match=match):
        LinformerAttention(d_model, num_heads=heads)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(r=0), "r is 0, wanted 1 to 512"),
        (dict(r=513), "r is 513"),
        (dict(sharing="layer"), "sharing is 'layer', wanted one of none, headwise, key_value, layerwise"),
        (dict(init="zeros"), "init is 'zeros', wanted one of frames, normal"),
        (dict(num_heads=3), "num_heads is 3, wanted a divisor of d_model = 16"),
        (dict(num_heads=0), "num_heads is 0, wanted 1 to"),
        (dict(max_length=0), "max_length is 0"),
        (dict(dropout=1.0), "dropout is 1.0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LinformerAttention(16, **{"num_heads": 2, **options})


def test_limits_are_named():
    with pytest.raises(ValueError, match="hidden_states has 41 frames, wanted at most max_length = 40"):
        LinformerAttention(16, max_length=40, num_heads=2)(torch.randn(1, 41, 16))

    class Unlimited:
        hidden_size, num_attention_heads = 16, 2

    with pytest.raises(ValueError, match="max_length is None for a model without a limit"):
        LinformerAttention.from_attention(attention(), Unlimited)
