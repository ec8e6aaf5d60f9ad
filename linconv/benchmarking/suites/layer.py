"""A mixer with its projections against the attention layer whose place it takes, and against two Mamba2 of transformers."""  # noqa: E501

import functools

import torch

from linconv import mixers
from linconv.benchmarking.suite import LARGEST, Absent, Case, CheckFailed, Cost, Implementation, Setting
from linconv.benchmarking.suites import peers
from linconv.benchmarking.suites.modules import check_module, key_mask

WIDTHS = (1024, 768, 512, 384)  # wav2vec2-large and whisper-medium, wav2vec2-base, whisper-base, whisper-tiny
HEADDIM = 64
MIXERS = ("bimamba2", "hydra", "linformer")


def attention_layer(width, implementation):
    """Self-attention of transformers with its four projections, and its config."""
    from transformers import Wav2Vec2Config
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2Attention

    heads = width // HEADDIM
    config = Wav2Vec2Config(hidden_size=width, num_attention_heads=heads)
    config._attn_implementation = implementation
    return Wav2Vec2Attention(width, heads, config=config).eval(), config


def build(name, width, length):
    """A mixer in place of such a layer, for sequences of up to ``length``.

    Raises:
        Absent: linconv has no mixer of that name.
    """
    if name not in mixers.names():
        raise Absent(f"this version of linconv has no mixer {name}")
    mixer, (attention, config) = mixers.get(name), attention_layer(width, "sdpa")
    longest = {"max_length": length} if "max_length" in mixer.options() else {}
    return mixer.from_attention(attention, config, **longest).eval()


def _on(setting, module):
    return module.to(device=setting.device, dtype=setting.torch_dtype)


def _call(setting, length, width, module, **keywords):
    x = setting.tensor(setting.batch, length, width)

    def function():
        y = module(x, **keywords)
        return y[0] if isinstance(y, tuple) else y

    return function, [x, *module.parameters()]


def mixer_layer(setting, length, width, name):
    module = _on(setting, build(name, width, length))
    return _call(setting, length, width, module, seq_lens=setting.seq_lens(length))


def attention(setting, length, width, implementation):
    module = _on(setting, attention_layer(width, implementation)[0])
    mask = key_mask(setting.seq_lens(length), length, implementation, setting.torch_dtype)
    return _call(setting, length, width, module, attention_mask=mask)


class TwoMamba2(torch.nn.Module):
    """transformers' mixer, once for each direction, with the weights of a BiMamba2."""

    def __init__(self, layer):
        super().__init__()
        from transformers import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        config = Mamba2Config(
            hidden_size=layer.d_model, num_heads=layer.nheads, head_dim=layer.headdim, state_size=layer.d_state,
            n_groups=1, expand=1, conv_kernel=layer.d_conv, use_bias=False, use_conv_bias=True,
            layer_norm_epsilon=1e-5, chunk_size=256,
        )  # fmt: skip
        self.directions = torch.nn.ModuleList(Mamba2Mixer(config, layer_idx=0) for _ in range(2))
        for mixer, weights in zip(self.directions, layer.mamba_ssm_state_dicts()):
            mixer.load_state_dict(weights)

    def forward(self, x):
        forward, backward = self.directions
        return forward(x) + backward(x.flip(1)).flip(1)


def two_mamba2(setting, length, width):
    return _call(setting, length, width, _on(setting, TwoMamba2(build("bimamba2", width, length)).eval()))


def check(width, name, setting):
    module = _on(setting, build(name, width, 200))
    check_module(module, lambda module, x: module(x), [setting.tensor(1, 200, width).detach()])


@torch.no_grad()
def check_two_mamba2(width, setting):
    layer = build("bimamba2", width, 200)
    x = torch.randn(1, 200, width)
    error = (layer(x) - TwoMamba2(layer)(x)).abs().max().item()
    if not error < 1e-4:
        raise CheckFailed(f"differs from BiMamba2 by {error:.2e}")


def cost(width, name, setting, length):
    with torch.device("meta"):
        flops = build(name, width, length).flops(length)
    return Cost(flops=(1 if setting.work == "forward" else 3) * setting.batch * flops, dtype=setting.dtype)


def attention_flops(width, length):
    return 2 * length * 4 * width**2 + 4 * length**2 * width


def attention_cost(width, setting, length):
    factor = 1 if setting.work == "forward" else 3
    return Cost(flops=factor * setting.batch * attention_flops(width, length), dtype=setting.dtype)


def _implementations(width, mixed):
    for name in MIXERS:
        yield Implementation(
            name, mixer_layer, (width, name), ours=True, check=functools.partial(check, width, name),
            cost=functools.partial(cost, width, name),
        )  # fmt: skip
    for implementation in ("sdpa", "eager"):
        name = {"sdpa": "attention layer (SDPA)", "eager": "attention layer (eager)"}[implementation]
        floor = functools.partial(attention_cost, width)
        matrices = functools.partial(peers.weights_bytes, width // HEADDIM) if implementation == "eager" else None
        yield Implementation(name, attention, (width, implementation), degree=2, cost=floor, memory=matrices)
    yield Implementation(
        "two Mamba2 of transformers with flips", two_mamba2, (width,),
        check=functools.partial(check_two_mamba2, width),
        reason="it takes no batches of mixed lengths" if mixed else None,
    )  # fmt: skip


def cases(device):
    def case(width, *setting, **keywords):
        setting = Setting(*setting, device=device, **keywords)
        return Case(
            f"layer of width {width}", setting, tuple(_implementations(width, setting.mixed)),
            baseline="attention layer (SDPA)", facts={"width": width},
        )  # fmt: skip

    for width in WIDTHS:
        yield case(width, "forward", "float32")
    yield case(WIDTHS[0], "training", "float32")
    yield case(WIDTHS[0], "forward", "bfloat16")
    yield case(WIDTHS[0], "training", "bfloat16")
    yield case(WIDTHS[0], "forward", "float32", batch=8)
    yield case(WIDTHS[0], "forward", "float32", batch=8, mixed=True)
    yield case(WIDTHS[0], "forward", "bfloat16", batch=LARGEST)
