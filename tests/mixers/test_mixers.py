"""Mixers against the formulas of the papers, against transformers' Mamba-2, and against their own contract."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from linconv import mixers
from linconv.mixers.linformer import LinformerAttention
from linconv.ops import dispatch

SMALL = dict(d_state=8, headdim=8)
BIDIRECTIONAL = ("bimamba2", "hydra")
CAUSAL = ("mamba", "mamba2")
DUAL = (*BIDIRECTIONAL, "mamba2")
STATE_SPACE = (*BIDIRECTIONAL, *CAUSAL)
COMPILED = all(dispatch.compiled(op) for op in ("bidirectional_ssd", "selective_scan", "short_conv", "gated_rms_norm"))


def small(name, d_model=16, **options):
    """A mixer of that name with small sizes."""
    sizes = dict(d_state=8) if name == "mamba" else SMALL
    return mixers.get(name)(d_model, **{**sizes, **options})


def mamba2_by_formula(weights, u, *, d_conv, headdim, d_state, ngroups):
    """Mamba-2 of `mamba_ssm`'s weights as a loop over time (arXiv 2405.21060, eq. 1 and figure 6)."""
    length, d_inner = u.shape[1], weights["norm.weight"].numel()
    heads = d_inner // headdim
    z, xBC, dt = F.linear(u, weights["in_proj.weight"]).split((d_inner, d_inner + 2 * ngroups * d_state, heads), -1)
    padded = F.pad(xBC, (0, 0, d_conv - 1, 0))
    taps = [padded[:, k : k + length] * weights["conv1d.weight"][:, 0, k] for k in range(d_conv)]
    xBC = F.silu(sum(taps) + weights["conv1d.bias"])
    x, B, C = xBC.split((d_inner, ngroups * d_state, ngroups * d_state), -1)
    x = x.unflatten(-1, (heads, headdim))
    B, C = (t.unflatten(-1, (ngroups, d_state)).repeat_interleave(heads // ngroups, dim=2) for t in (B, C))
    dt = F.softplus(dt + weights["dt_bias"])
    A = -weights["A_log"].exp()
    h = u.new_zeros(u.shape[0], heads, headdim, d_state)
    y = []
    for t in range(length):
        decay = (dt[:, t] * A).exp()[..., None, None]
        h = decay * h + dt[:, t, :, None, None] * x[:, t, :, :, None] * B[:, t, :, None, :]
        y.append((h * C[:, t, :, None, :]).sum(-1) + weights["D"][:, None] * x[:, t])
    y = torch.stack(y, 1).flatten(-2) * F.silu(z)
    grouped = y.unflatten(-1, (ngroups, -1))
    y = (grouped * (grouped.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(-2) * weights["norm.weight"]
    return F.linear(y, weights["out_proj.weight"])


def randomised(mixer):
    """A mixer none of whose parameters has a value that could hide a mistake, as ones and zeros do."""
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name in ("D", "norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return mixer.double()


@pytest.mark.parametrize("ngroups", [1, 2])
def test_mamba2_is_the_formula(ngroups):
    mixer = randomised(mixers.Mamba2(16, **SMALL, ngroups=ngroups))
    u = torch.randn(2, 37, 16, dtype=torch.double)
    wanted = mamba2_by_formula(mixer.state_dict(), u, d_conv=4, ngroups=ngroups, **SMALL)
    torch.testing.assert_close(mixer(u), wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("ngroups", [1, 2])
def test_bimamba2_is_two_mamba2_layers_one_over_reversed_time(ngroups):
    mixer = randomised(mixers.BiMamba2(16, **SMALL, ngroups=ngroups))
    u = torch.randn(2, 37, 16, dtype=torch.double)
    forward, backward = mixer.mamba_ssm_state_dicts()
    sizes = dict(d_conv=4, ngroups=ngroups, **SMALL)
    wanted = mamba2_by_formula(forward, u, **sizes) + mamba2_by_formula(backward, u.flip(1), **sizes).flip(1)
    torch.testing.assert_close(mixer(u), wanted, rtol=1e-9, atol=1e-11)


def test_bimamba2_is_two_passes_of_the_mixer_of_transformers():
    mixer = randomised(mixers.BiMamba2(32, d_state=16, headdim=8)).float()
    config = Mamba2Config(
        hidden_size=32, state_size=16, expand=1, head_dim=8, num_heads=4, n_groups=1, conv_kernel=4, use_bias=False,
        use_conv_bias=True, layer_norm_epsilon=1e-5, chunk_size=16,
    )  # fmt: skip
    u = torch.randn(2, 50, 32)
    wanted = 0
    for weights, turn in zip(mixer.mamba_ssm_state_dicts(), (lambda t: t, lambda t: t.flip(1))):
        peer = Mamba2Mixer(config, layer_idx=0)
        peer.load_state_dict(weights)
        wanted = wanted + turn(peer(turn(u)))
    torch.testing.assert_close(mixer(u), wanted, rtol=1e-4, atol=1e-5)


def test_mamba_is_the_formula():
    """arXiv 2312.00752, algorithm 2 and figure 3, with the discretization of `mamba_ssm`, as a loop over time."""
    mixer = randomised(mixers.Mamba(16, d_state=8, dt_rank=3))
    u, weights = torch.randn(2, 37, 16, dtype=torch.double), mixer.state_dict()
    x, z = F.linear(u, weights["in_proj.weight"]).chunk(2, -1)
    x = F.silu(F.conv1d(x.mT, weights["conv1d.weight"], weights["conv1d.bias"], padding=3, groups=32)[..., :37]).mT
    dt, B, C = F.linear(x, weights["x_proj.weight"]).split((3, 8, 8), -1)
    dt = F.softplus(F.linear(dt, weights["dt_proj.weight"], weights["dt_proj.bias"]))
    A, h, y = -weights["A_log"].exp(), u.new_zeros(2, 32, 8), []
    for t in range(37):
        h = (dt[:, t, :, None] * A).exp() * h + dt[:, t, :, None] * B[:, t, None] * x[:, t, :, None]
        y.append((h * C[:, t, None]).sum(-1) + weights["D"] * x[:, t])
    wanted = F.linear(torch.stack(y, 1) * F.silu(z), weights["out_proj.weight"])
    torch.testing.assert_close(mixer(u), wanted, rtol=1e-9, atol=1e-11)


def test_mamba_is_the_mixer_of_transformers():
    mixer = randomised(mixers.Mamba(32)).float()
    config = MambaConfig(hidden_size=32, state_size=16, expand=2, conv_kernel=4, time_step_rank=2)
    peer = MambaMixer(config, layer_idx=0)
    peer.load_state_dict(mixer.state_dict())
    u = torch.randn(2, 50, 32)
    torch.testing.assert_close(mixer(u), peer(u), rtol=1e-4, atol=1e-5)


def test_hydra_is_two_strict_scans_and_a_diagonal():
    mixer = randomised(mixers.Hydra(16, **SMALL))
    u = torch.randn(2, 23, 16, dtype=torch.double)
    z, xBC, dt = F.linear(u, mixer.in_proj.weight).split((16, 16 + 4 * 8, 4), -1)
    conv = F.conv1d(xBC.mT, mixer.conv1d.weight[:, None], mixer.conv1d.bias, padding=3, groups=mixer.conv_dim)
    x, B_f, C_f, B_b, C_b = F.silu(conv).mT.split((16, 8, 8, 8, 8), -1)
    x = x.unflatten(-1, (2, 8))
    steps = F.softplus(dt.unflatten(-1, (2, 2)) + mixer.dt_bias)  # (b, L, direction, heads)
    A = -mixer.A_log.exp()

    def causal(x, dt, B, C):
        h, y = x.new_zeros(2, 2, 8, 8), []
        for t in range(x.shape[1]):
            update = dt[:, t, :, None, None] * x[:, t, :, :, None] * B[:, t, None, None, :]
            h = (dt[:, t] * A).exp()[..., None, None] * h + update
            y.append((h * C[:, t, None, None, :]).sum(-1))
        return F.pad(torch.stack(y, 1)[:, :-1], (0, 0, 0, 0, 1, 0))  # one frame later: strictly triangular

    y = causal(x, steps[:, :, 0], B_f, C_f) + causal(*(t.flip(1) for t in (x, steps[:, :, 1], B_b, C_b))).flip(1)
    y = (y + mixer.D[:, None] * x).flatten(-2) * F.silu(z)
    y = y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * mixer.norm.weight
    torch.testing.assert_close(mixer(u), F.linear(y, mixer.out_proj.weight), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("d_model, wanted", [(1024, 6_863_456), (768, 3_962_440)])
def test_parameter_count_of_bimamba2(d_model, wanted):
    with torch.device("meta"):
        mixer = mixers.BiMamba2(d_model)
    assert sum(p.numel() for p in mixer.parameters()) == wanted


def test_mamba2_has_the_state_dict_of_mamba_ssm():
    state = {
        name: tuple(tensor.shape) for name, tensor in mixers.Mamba2(32, d_state=16, headdim=8).state_dict().items()
    }
    assert state == {
        "dt_bias": (8,),
        "A_log": (8,),
        "D": (8,),
        "in_proj.weight": (2 * 64 + 2 * 16 + 8, 32),
        "conv1d.weight": (64 + 2 * 16, 1, 4),
        "conv1d.bias": (64 + 2 * 16,),
        "norm.weight": (64,),
        "out_proj.weight": (32, 64),
    }


def test_mamba_has_the_state_dict_of_mamba_ssm():
    state = {name: tuple(tensor.shape) for name, tensor in mixers.Mamba(32).state_dict().items()}
    assert state == {
        "A_log": (64, 16),
        "D": (64,),
        "in_proj.weight": (128, 32),
        "conv1d.weight": (64, 1, 4),
        "conv1d.bias": (64,),
        "x_proj.weight": (2 + 2 * 16, 64),
        "dt_proj.weight": (64, 2),
        "dt_proj.bias": (64,),
        "out_proj.weight": (32, 64),
    }


def test_weights_go_to_mamba_ssm_and_back():
    source, target = (mixers.BiMamba2(32, **SMALL) for _ in range(2))
    halves = source.mamba_ssm_state_dicts()
    single = mixers.Mamba2(32, **SMALL, expand=1).state_dict()
    for half in halves:
        assert {k: v.shape for k, v in half.items()} == {k: v.shape for k, v in single.items()}
    target.load_mamba_ssm(*halves)
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name


def test_wrong_mamba_ssm_weights_change_nothing():
    mixer = mixers.BiMamba2(32, **SMALL)
    before = {name: tensor.clone() for name, tensor in mixer.state_dict().items()}
    forward, backward = (dict(d) for d in mixers.BiMamba2(32, **SMALL).mamba_ssm_state_dicts())
    with pytest.raises(TypeError, match="backward_layer is list, wanted the state dict of a Mamba2"):
        mixer.load_mamba_ssm(forward, [])
    with pytest.raises(TypeError, match=r"backward_layer\['D'\] is list, wanted a torch.Tensor"):
        mixer.load_mamba_ssm(forward, {**backward, "D": [1.0] * 4})
    with pytest.raises(ValueError, match=r"backward_layer\['D'\] has shape \(5,\), wanted \(4,\)"):
        mixer.load_mamba_ssm(forward, {**backward, "D": torch.ones(5)})
    backward.pop("A_log")
    with pytest.raises(ValueError, match="backward_layer lacks .*A_log"):
        mixer.load_mamba_ssm(forward, backward)
    for name, tensor in mixer.state_dict().items():
        assert torch.equal(before[name], tensor), name


@pytest.mark.skipif(not COMPILED, reason="torch's products are not bound to bits")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", STATE_SPACE)
def test_a_padded_row_is_what_it_is_alone_and_padding_gets_nothing(name, precision):
    """Bit for bit: results, and gradients of hidden states."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    module = randomised(small(name)).to(dtype)
    lengths = torch.tensor([200, 0, 1, 67])
    u, upstream = torch.randn(4, 200, 16, dtype=dtype, requires_grad=True), torch.randn(4, 200, 16)

    def mixer(*inputs):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            return module(*inputs)

    y = mixer(u, lengths)
    upstream = upstream.to(y.dtype)
    y.backward(upstream)
    for row, length in enumerate(lengths):
        assert torch.all(y[row, length:] == 0)
        assert torch.all(u.grad[row, length:] == 0)
        alone = u.detach()[row : row + 1, :length].requires_grad_()
        of_alone = mixer(alone)
        of_alone.backward(upstream[row : row + 1, :length])
        assert torch.equal(y[row, :length], of_alone[0])
        assert torch.equal(u.grad[row, :length], alone.grad[0])


@pytest.mark.parametrize("name", STATE_SPACE)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1)])
def test_empty_and_shortest_inputs(name, shape):
    mixer = small(name)
    assert mixer(torch.randn(*shape, 16)).shape == (*shape, 16)


@pytest.mark.parametrize("name", STATE_SPACE)
def test_every_parameter_gets_a_gradient(name):
    mixer = small(name)
    mixer(torch.randn(2, 20, 16)).square().sum().backward()
    for parameter_name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


class Adapter(nn.Module):
    """A low-rank addition to a linear layer, in its place, as LoRA's."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = (
            nn.Parameter(torch.randn(shape) * 0.3) for shape in ((2, base.in_features), (base.out_features, 2))
        )

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


@pytest.mark.parametrize(
    "name, layers",
    [
        ("linformer", ["q_proj"]),
        ("linformer", ["q_proj", "k_proj", "v_proj", "out_proj"]),
        ("mamba", ["in_proj", "x_proj", "dt_proj", "out_proj"]),
        ("mamba2", ["in_proj", "out_proj"]),
        ("bimamba2", ["in_proj", "out_proj"]),
        ("hydra", ["in_proj", "out_proj"]),
    ],
)
def test_an_adapter_of_a_projection_does_what_it_does_merged(name, layers):
    torch.manual_seed(0)
    options = dict(r=4, max_length=16, num_heads=2) if name == "linformer" else {}
    adapted = mixers.get(name)(16, **options) if options else small(name)
    merged = copy.deepcopy(adapted)
    for layer in layers:
        adapter = Adapter(getattr(adapted, layer))
        setattr(adapted, layer, adapter)
        getattr(merged, layer).weight.data.addmm_(adapter.up.data, adapter.down.data)
    x, seq_lens = torch.randn(2, 9, 16), torch.tensor([9, 5])
    y = adapted(x, seq_lens)
    torch.testing.assert_close(y, merged(x, seq_lens))
    assert not y[1, 5:].any()
    y.sum().backward()
    assert all(parameter.grad.any() for path, parameter in adapted.named_parameters() if path.endswith(("up", "down")))


@pytest.fixture
def mesh():
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", mixers.names())
def test_linear_layers_may_be_sharded_one_by_one(name, mesh):
    torch.manual_seed(0)
    mixer = LinformerAttention(16, r=4, max_length=16, num_heads=2) if name == "linformer" else small(name)
    sharded = copy.deepcopy(mixer)
    for module in sharded.modules():
        if isinstance(module, torch.nn.Linear):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    x, seq_lens = torch.randn(2, 9, 16), torch.tensor([9, 5])
    ys = [m(x, seq_lens) for m in (mixer, sharded)]
    torch.testing.assert_close(*ys)
    for y in ys:
        y.square().sum().backward()
    for parameter, shard in zip(mixer.parameters(), sharded.parameters()):
        got = shard.grad.full_tensor() if hasattr(shard.grad, "full_tensor") else shard.grad
        torch.testing.assert_close(got, parameter.grad)


def test_layers_of_one_projection_that_are_sharded_apart_are_named(mesh):
    layers = [LinformerAttention(16, r=4, sharing="layerwise", max_length=16, num_heads=2) for _ in range(2)]
    LinformerAttention.join(layers)
    x = torch.randn(1, 9, 16)
    want = [layer(x) for layer in layers]
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    torch.testing.assert_close(layers[0](x), want[0])
    with pytest.raises(ValueError, match='sharing is "layerwise", and proj_k .* is sharded .*; wanted all'):
        layers[1](x)


def test_bidirectional_mixers_see_both_ways_and_causal_ones_do_not_look_ahead():
    for name in STATE_SPACE:
        mixer = small(name)
        u = torch.randn(1, 30, 16)
        changed = u.clone()
        changed[0, 20] += 1
        difference = (mixer(changed) - mixer(u)).abs().amax(-1)[0]
        assert difference[20:].min() > 0
        assert (difference[:20].max() > 0) == (name in BIDIRECTIONAL) == (not mixer.causal)


@pytest.mark.parametrize("name, options", [("mamba", {}), ("mamba2", dict(ngroups=2))])
def test_decodes_frame_by_frame(name, options):
    mixer = randomised(small(name, **options))
    u = torch.randn(3, 31, 16, dtype=torch.double)
    state = mixer.new_state(3)
    prompt = mixer(u[:, :20], state=state)
    steps = [mixer.step(u[:, t], state) for t in range(20, 31)]
    torch.testing.assert_close(torch.cat((prompt, torch.stack(steps, 1)), 1), mixer(u), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
@pytest.mark.parametrize("name, options", [("mamba", {}), ("mamba2", dict(ngroups=2))])
def test_goes_on_from_a_padded_prompt(name, options, dtype):
    """Each row from its own last frame, in the bits of the row alone; a row without frames stays where it is."""
    mixer = randomised(small(name, **options)).to(dtype)
    u, more = torch.randn(4, 20, 16, dtype=dtype), torch.randn(4, 5, 16, dtype=dtype)
    lengths = [20, 7, 2, 0]
    state = mixer.new_state(4)
    together = mixer(u, torch.tensor(lengths), state=state)
    after = mixer(more, torch.tensor([5, 3, 0, 5]), state=state)
    step = mixer.step(more[:, 0], state)
    for row, (length, further) in enumerate(zip(lengths, (5, 3, 0, 5))):
        alone = mixer.new_state(1)
        assert torch.equal(mixer(u[row : row + 1, :length], state=alone), together[row : row + 1, :length])
        assert torch.equal(mixer(more[row : row + 1, :further], state=alone), after[row : row + 1, :further])
        assert torch.equal(mixer.step(more[row : row + 1, 0], alone), step[row : row + 1])
        assert torch.equal(alone.conv, state.conv[row : row + 1]) and torch.equal(alone.ssm, state.ssm[row : row + 1])
        assert not together[row, length:].any() and not after[row, further:].any()
    with pytest.raises(ValueError, match="seq_lens holds 21, wanted 0 to L = 20"):
        mixer(u, torch.tensor([21, 1, 1, 1]), state=mixer.new_state(4))


@pytest.mark.parametrize("lengths", [None, [50, 3]])
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_state_keeps_no_more_than_it_has(name, lengths):
    """However long the prompt; of a view the whole memory would stay."""
    mixer = small(name)
    state = mixer.new_state(2)
    mixer(torch.randn(2, 50, 16), None if lengths is None else torch.tensor(lengths), state=state)
    for tensor in (state.conv, state.ssm):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("name", DUAL)
def test_initial_values_are_those_of_mamba_ssm(name):
    torch.manual_seed(0)
    mixer = mixers.get(name)(256, headdim=1)
    A, dt = -mixer.A, F.softplus(mixer.dt_bias)
    assert 1 <= A.min() < 1.5 and 15.5 < A.max() <= 16
    assert 1e-3 * 0.999 <= dt.min() < 2e-3 and 0.05 < dt.max() <= 0.1 * 1.001
    assert abs(dt.log().mean() - math.log(1e-2)) < 0.3  # log-uniform
    assert torch.all(mixer.D == 1) and torch.all(mixer.norm.weight == 1)


def test_initial_values_of_mamba_are_those_of_mamba_ssm():
    mixer = mixers.Mamba(256)
    dt = F.softplus(mixer.dt_proj.bias)
    torch.testing.assert_close(mixer.A, -torch.arange(1.0, 17).expand(512, 16))
    assert 1e-3 * 0.999 <= dt.min() < 2e-3 and 0.05 < dt.max() <= 0.1 * 1.001
    assert mixer.dt_rank == 16 and 0.2 < mixer.dt_proj.weight.abs().max() <= 0.25
    assert torch.all(mixer.D == 1)


@pytest.mark.parametrize("name", STATE_SPACE)
def test_low_precision_stays_close(name):
    torch.manual_seed(0)
    mixer = small(name, 64, d_state=16)
    u = torch.randn(2, 100, 64)
    wanted = mixer(u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = mixer(u)
    assert mixed.dtype == torch.bfloat16
    low = mixer.bfloat16()(u.bfloat16())
    for got in (mixed, low):
        assert (got.float() - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.skipif(not COMPILED, reason="the compiled operators are not there")
@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_a_forward_pass_is_two_products_and_three_operators(name):
    mixer = mixers.get(name)(64, d_state=16, headdim=16)
    hidden, lengths = torch.randn(2, 100, 64), torch.tensor([100, 60])
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        mixer(hidden, lengths)
    names = [event.name for event in profiled.events()]
    steps = ["conv_scan", "short_conv", "bidirectional_ssd", "gated_rms_norm"]
    ours = [name.removeprefix("linconv::") for name in names if name.startswith("linconv::")]
    assert ours == ["linear", *steps, "linear"]
    assert not {"aten::mm", "aten::addmm", "aten::bmm", "aten::linear"} & set(names)
    moved = {"aten::flip", "aten::clone", "aten::copy_", "aten::_to_copy", "aten::contiguous", "aten::cat"}
    assert not moved & set(names)


@pytest.mark.skipif(not COMPILED, reason="the reference operators are not one graph")
@pytest.mark.parametrize("name", STATE_SPACE)
def test_torch_compile_in_one_graph(name):
    mixer = small(name)
    u, lengths = torch.randn(2, 20, 16), torch.tensor([20, 7])
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(u, lengths), mixer(u, lengths))


@pytest.mark.skipif(not COMPILED, reason="the reference operators are not one graph")
@pytest.mark.parametrize("name", STATE_SPACE)
def test_torch_compile_under_a_default_device(name):
    mixer, u = small(name), torch.randn(2, 20, 16)
    torch.set_default_device("cpu")  # by which scripts on a GPU set theirs
    try:
        compiled = torch.compile(mixer, fullgraph=True, backend="eager")(u)
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(compiled, mixer(u))


@pytest.mark.skipif(not COMPILED, reason="the reference operators are not one graph")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", mixers.names())
def test_exports_for_any_length(name, strict):
    """Linformer attention too, whose order of products depends on the length."""
    mixer = mixers.LinformerAttention(16, r=4, max_length=64, num_heads=2) if name == "linformer" else small(name)
    lengths = torch.export.Dim("L", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(
            mixer.eval(),
            (torch.randn(2, 20, 16),),
            dynamic_shapes={"hidden_states": {1: lengths}},
            strict=strict,
        ).module()
        for length in (2, 33, 64):
            u = torch.randn(2, length, 16)
            torch.testing.assert_close(program(u), mixer(u))


def test_flops_are_counted_as_documented():
    mixer = mixers.BiMamba2(1024)
    scan = 2 * (4 * 16 * 128 * 64 + 64 * 16 * 64 + 64 * 1 * 128)
    weights = mixer.in_proj.weight.numel() + mixer.out_proj.weight.numel() + mixer.conv1d.weight.numel()
    assert mixer.flops(1000) == 1000 * (scan + 2 * weights)


def test_flops_of_mamba_are_counted_as_documented():
    mixer = mixers.Mamba(64)
    weights = 64 * 256 + 128 * 4 + 128 * (4 + 32) + 4 * 128 + 128 * 64
    assert mixer.flops(1000) == 1000 * (2 * weights + 7 * 128 * 16)


def test_registry():
    assert mixers.get("bimamba2") is mixers.BiMamba2
    with pytest.raises(ValueError, match=r"mixer is 'bimamba', wanted one of .* \(did you mean 'bimamba2'\?\)"):
        mixers.get("bimamba")
    with pytest.raises(ValueError, match="already the mixer BiMamba2"):
        mixers.register("bimamba2", mixers.Hydra)
    with pytest.raises(TypeError, match="subclass of linconv.mixers.Mixer"):
        mixers.register("linear", nn.Linear)
    with pytest.raises(TypeError, match="name is 3, wanted a str"):
        mixers.register(3, mixers.Hydra)


def test_a_class_that_is_defined_again_takes_its_own_place(monkeypatch):
    """As when the cell of a notebook is run again."""
    monkeypatch.setattr(mixers, "_REGISTRY", dict(mixers._REGISTRY))

    def define():
        class Own(mixers.Hydra):
            pass

        return Own

    first, second = define(), define()
    for own in (first, first, second):
        mixers.register("own", own)
        assert mixers.get("own") is own


@pytest.mark.parametrize("name", mixers.names())
def test_rates_skips_and_steps_of_a_state_are_marked_not_to_decay(name):
    mixer = mixers.get(name)(64)
    marked = {n for n, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    own = {n for n, _ in mixer.named_parameters(recurse=False)}
    assert marked == (set() if name == "linformer" else own & {"A_log", "D", "dt_bias"})
    assert name == "linformer" or {"A_log", "D"} <= marked
    mixer.A_log = nn.Parameter(torch.zeros(2))  # as loading a checkpoint does
    assert getattr(mixer.A_log, "_no_weight_decay", False) == (name != "linformer")


@pytest.mark.parametrize(
    "options, error, match",
    [
        (dict(headdim=24), ValueError, "headdim is 24"),
        (dict(ngroups=3), ValueError, "ngroups is 3"),
        (dict(chunk_size="x"), TypeError, "chunk_size is 'x', wanted an int"),
        (dict(dstate=8), TypeError, "no option 'dstate', wanted one of d_state"),
        (dict(d_state=300), ValueError, "d_state is 300, wanted 1 to 256"),
        (dict(d_state="abc"), TypeError, "d_state is 'abc', wanted an int"),
        (dict(headdim=8.0), TypeError, "headdim is 8.0, wanted an int"),
        (dict(expand=0), ValueError, "expand is 0, wanted a number above 0"),
    ],
)
def test_wrong_options_are_named(options, error, match):
    class Config:
        hidden_size = 64

    with pytest.raises(error, match=match):
        mixers.BiMamba2.from_attention(nn.Linear(64, 64), Config, **options)


@pytest.mark.parametrize("name", DUAL)
@pytest.mark.parametrize(
    "options, error, match",
    [
        (dict(d_state=0), ValueError, "d_state is 0, wanted 1 to 256"),
        (dict(d_state=257), ValueError, "d_state is 257, wanted 1 to 256"),
        (dict(d_state=True), TypeError, "d_state is True, wanted an int"),
        (dict(d_conv=99), ValueError, "d_conv is 99, wanted 2 to 8"),
        (dict(d_conv=1), ValueError, "d_conv is 1, wanted 2 to 8"),
        (dict(d_conv=None), TypeError, "d_conv is None, wanted an int"),
        (dict(headdim=0), ValueError, "headdim is 0, wanted 1 to 256"),
        (dict(headdim=512, expand=8), ValueError, "headdim is 512, wanted 1 to 256"),
        (dict(ngroups=0), ValueError, "ngroups is 0, wanted 1 to 16777216"),
        (dict(expand=-1), ValueError, "expand is -1, wanted a number above 0"),
        (dict(expand=math.nan), ValueError, "expand is nan, wanted a number above 0"),
        (dict(expand="2"), TypeError, "expand is '2', wanted a number"),
        (dict(expand=0.001), ValueError, r"headdim is 64, wanted a divisor of expand \* d_model = 0"),
        (dict(d_model=0), ValueError, "d_model is 0, wanted 1 to 16777216"),
        (dict(d_model=64.0), TypeError, "d_model is 64.0, wanted an int"),
        (dict(d_model=10**30), ValueError, "d_model is 1000.*, wanted 1 to 16777216"),
        (dict(expand=10**30), ValueError, r"expand is 1000.*, wanted at most 16777216 for expand \* d_model"),
        (dict(expand=1e308), ValueError, r"expand is 1e\+308, wanted at most 16777216 for expand \* d_model"),
        (dict(expand=math.inf), ValueError, "expand is inf, wanted at most"),
    ],
)
def test_options_are_checked_at_construction(name, options, error, match):
    with pytest.raises(error, match=match):
        mixers.get(name)(**{"d_model": 64, **options})


@pytest.mark.parametrize(
    "options, error, match",
    [
        (dict(d_state=257), ValueError, "d_state is 257, wanted 1 to 256"),
        (dict(d_conv=1), ValueError, "d_conv is 1, wanted 2 to 8"),
        (dict(dt_rank=0), ValueError, "dt_rank is 0, wanted 1 to 16777216"),
        (dict(dt_rank="full"), TypeError, "dt_rank is 'full', wanted an int"),
        (dict(expand=0.001), ValueError, "expand is 0.001, wanted at least one channel of d_model = 64"),
    ],
)
def test_options_of_mamba_are_checked_at_construction(options, error, match):
    with pytest.raises(error, match=match):
        mixers.Mamba(**{"d_model": 64, **options})


@pytest.mark.parametrize("name", DUAL)
def test_the_limits_of_the_options_run(name):
    u = torch.randn(1, 5, 512)
    for options in (dict(d_state=256, headdim=256), dict(d_state=1, headdim=1, d_conv=3), dict(d_conv=7)):
        assert mixers.get(name)(512, **options)(u).shape == u.shape


@pytest.mark.parametrize("name", mixers.names())
@pytest.mark.parametrize(
    "hidden_states, error, match",
    [
        (torch.randn(5, 128), ValueError, r"hidden_states has shape \(5, 128\), wanted \(batch, L, d_model\) = "),
        (torch.randn(2, 1, 5, 128), ValueError, r"hidden_states has shape \(2, 1, 5, 128\)"),
        (torch.randn(2, 5, 64), ValueError, r"wanted \(batch, L, d_model\) = \(any, any, 128\)"),
        (torch.ones(2, 5, 128).long(), TypeError, "hidden_states has dtype torch.int64, wanted one of torch.float32"),
        ([[0.0] * 128], TypeError, "hidden_states is list, wanted a torch.Tensor"),
    ],
    ids=["2d", "4d", "width", "integers", "list"],
)
def test_wrong_hidden_states_are_named(name, hidden_states, error, match):
    with pytest.raises(error, match=match):
        mixers.get(name)(128)(hidden_states)


def test_wrong_hidden_states_of_a_step_are_named():
    mixer = mixers.Mamba2(16, **SMALL)
    with pytest.raises(
        ValueError, match=r"hidden_states has shape \(1, 3, 16\), wanted \(batch, d_model\) = \(any, 16\)"
    ):
        mixer.step(torch.randn(1, 3, 16), mixer.new_state(1))


@pytest.mark.parametrize("name", [*STATE_SPACE, "linformer"])
def test_hidden_states_and_weights_are_both_float64_or_neither(name):
    single, double, u = mixers.get(name)(64), mixers.get(name)(64).double(), torch.randn(1, 3, 64)
    for module, wrong in ((single, u.double()), (double, u)):
        with pytest.raises(TypeError, match=f"hidden_states has dtype {wrong.dtype}, the weights have"):
            module(wrong)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@pytest.mark.parametrize(
    "batch, error, wanted",
    [(-1, ValueError, "0 to"), (10**30, ValueError, "0 to"), (None, TypeError, "an int"), (1.5, TypeError, "an int")],
)
def test_a_batch_that_no_state_has_is_named(name, batch, error, wanted):
    with pytest.raises(error, match=f"batch is {batch}, wanted {wanted}"):
        mixers.get(name)(64).new_state(batch)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_what_is_no_state_is_named(name):
    mixer = mixers.get(name)(16, **({"d_state": 4} if name == "mamba" else SMALL))
    for state in ({}, (torch.zeros(1), torch.zeros(1)), None):
        with pytest.raises(TypeError, match=f"state is {type(state).__name__}, wanted a MambaState"):
            mixer.step(torch.randn(1, 16), state)
    with pytest.raises(TypeError, match="state is dict, wanted a MambaState"):
        mixer(torch.randn(1, 3, 16), state={})


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_state_of_another_batch_is_named(name):
    mixer = mixers.get(name)(16, **({"d_state": 4} if name == "mamba" else SMALL))
    wanted = r"state.conv has shape \(2, 3, \d+\), wanted \(batch, d_conv - 1, channels\) = \(3, 3, \d+\)"
    with pytest.raises(ValueError, match=wanted):
        mixer.step(torch.randn(3, 16), mixer.new_state(2))


def test_from_attention_takes_dtype_and_draws_alike():
    class Config:
        hidden_size = 64

    drawn = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(3)
        drawn.append(mixers.Hydra.from_attention(nn.Linear(64, 64).to(dtype), Config, headdim=16))
    assert {p.dtype for p in drawn[1].parameters()} == {torch.bfloat16}
    for a, b in zip(drawn[0].parameters(), drawn[1].parameters()):
        assert torch.equal(a.bfloat16(), b)
    for source in (nn.Identity(), nn.ParameterList([nn.Parameter(torch.ones(2).to(torch.uint8), requires_grad=False)])):
        with pytest.raises(TypeError, match="attention has no floating-point weights, .* quantize"):
            mixers.Hydra.from_attention(source, Config, headdim=16)
