"""A mixer with its projections against the attention layer whose place it takes, and two Mamba2 of transformers."""

import functools

import torch

from linconv import mixers
from linconv.benchmarking.suite import LARGEST, TOKEN_LENGTHS, Case, CheckFailed, Cost, Implementation, Setting
from linconv.benchmarking.suites import peers
from linconv.benchmarking.suites.modules import check_module, key_mask

WIDTHS = (1024, 768, 512, 384)  # wav2vec2-large and whisper-medium, wav2vec2-base, whisper-base, whisper-tiny
HEADDIM = 64
MIXERS = ("bimamba2", "hydra", "linformer")
CAUSAL_WIDTHS = (1024, 768, 512)  # Pythia-410m, 160m and 70m
CAUSAL_MIXERS = ("mamba2", "mamba")


def attention_layer(width, implementation, causal=False):
    """Self-attention of transformers with its four projections, and its config: Wav2Vec2's, or GPT-NeoX's if causal."""
    from transformers import GPTNeoXConfig, Wav2Vec2Config
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2Attention

    heads = width // HEADDIM
    if causal:
        config = GPTNeoXConfig(hidden_size=width, num_attention_heads=heads, attn_implementation=implementation)
        return GPTNeoXAttention(config, layer_idx=0).eval(), config
    config = Wav2Vec2Config(hidden_size=width, num_attention_heads=heads)
    config._attn_implementation = implementation
    return Wav2Vec2Attention(width, heads, config=config).eval(), config


def build(name, width, length):
    """A mixer that replaces such a layer, for sequences of up to ``length``."""
    mixer, (attention, config) = mixers.get(name), attention_layer(width, "sdpa", causal=name in CAUSAL_MIXERS)
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


def causal_attention(setting, length, width):
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

    module, config = attention_layer(width, "sdpa", causal=True)
    positions = torch.arange(length, device=setting.device)[None]
    turns = GPTNeoXRotaryEmbedding(config).to(setting.device)(setting.tensor(1, 1, 1).detach(), positions)
    return _call(setting, length, width, _on(setting, module), attention_mask=None, position_embeddings=turns)


class TwoMamba2(torch.nn.Module):
    """transformers' Mamba2 mixer, once per direction, with the weights of a BiMamba2."""

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


def attention_flops(width, length, causal):
    """Causal attention needs half of the products between frames."""
    return 2 * length * 4 * width**2 + (2 if causal else 4) * length**2 * width


def attention_cost(width, causal, setting, length):
    factor = 1 if setting.work == "forward" else 3
    return Cost(flops=factor * setting.batch * attention_flops(width, length, causal), dtype=setting.dtype)


def _mixers(width, names):
    for name in names:
        yield Implementation(
            name, mixer_layer, (width, name), ours=True, check=functools.partial(check, width, name),
            cost=functools.partial(cost, width, name),
        )  # fmt: skip


def _implementations(width, mixed):
    yield from _mixers(width, MIXERS)
    for implementation in ("sdpa", "eager"):
        name = {"sdpa": "attention layer (SDPA)", "eager": "attention layer (eager)"}[implementation]
        floor = functools.partial(attention_cost, width, False)
        matrices = functools.partial(peers.weights_bytes, width // HEADDIM) if implementation == "eager" else None
        yield Implementation(name, attention, (width, implementation), degree=2, cost=floor, memory=matrices)
    yield Implementation(
        "two Mamba2 of transformers with flips", two_mamba2, (width,),
        check=functools.partial(check_two_mamba2, width),
        reason="it takes no batches of mixed lengths" if mixed else None,
    )  # fmt: skip


def _causal_implementations(width):
    yield from _mixers(width, CAUSAL_MIXERS)
    yield Implementation(
        "attention layer (SDPA)", causal_attention, (width,), degree=2,
        cost=functools.partial(attention_cost, width, True),
    )  # fmt: skip


def cases(device):
    def case(width, *setting, **keywords):
        setting = Setting(*setting, device=device, **keywords)
        return Case(
            f"layer of width {width}", setting, tuple(_implementations(width, setting.mixed)),
            baseline="attention layer (SDPA)", facts={"width": width},
        )  # fmt: skip

    if device == "cuda":  # the most common use of a GPU comes first, before time is up
        yield case(WIDTHS[0], "forward", "bfloat16", batch=8)
        yield case(WIDTHS[0], "forward", "bfloat16", batch=8, graph=True)
        yield case(WIDTHS[0], "training", "bfloat16", batch=8)
    for width in WIDTHS:
        yield case(width, "forward", "float32")
    yield case(WIDTHS[0], "training", "float32")
    yield case(WIDTHS[0], "forward", "bfloat16")
    yield case(WIDTHS[0], "training", "bfloat16")
    yield case(WIDTHS[0], "forward", "float32", batch=8)
    yield case(WIDTHS[0], "forward", "float32", batch=8, mixed=True)
    yield case(WIDTHS[0], "forward", "bfloat16", batch=LARGEST)
    for width in CAUSAL_WIDTHS:
        yield Case(
            f"causal layer of width {width}", Setting(device=device), tuple(_causal_implementations(width)),
            baseline="attention layer (SDPA)", lengths=TOKEN_LENGTHS, unit="tokens", units_per_second=None,
            facts={"width": width},
        )  # fmt: skip
