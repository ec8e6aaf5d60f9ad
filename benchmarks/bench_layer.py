"""A BiMamba2 or Hydra layer on CPU against the attention layer whose place it takes, in one run.

    python benchmarks/bench_layer.py --out benchmarks/results/cpu/layer.json
    python benchmarks/bench_layer.py --lengths --default-malloc --out layer_5_17.json

Width 1024, batch 1, fp32. Peers: Wav2Vec2's attention with its four projections (16 heads, SDPA); and two passes of
transformers' Mamba2Mixer with flips, which must come to the same result. The projections of the layer are timed alone:
what is left is the part that is not a GEMM.
"""

import functools

import torch

from linconv.benchmarking import compare
from linconv.benchmarking.record import run
from linconv.mixers import get

WIDTH, HEADS = 1024, 16
TRANSFORMERS_LENGTH = 1536
ATTENTION_UP_TO = 16_384


def attention_layer():
    from transformers import Wav2Vec2Config
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2Attention

    config = Wav2Vec2Config(hidden_size=WIDTH, num_attention_heads=HEADS)
    config._attn_implementation = "sdpa"
    return Wav2Vec2Attention(WIDTH, HEADS, config=config).eval()


def two_mamba2_mixers(layer):
    """transformers' mixer, once per direction, with the weights of `layer`."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=WIDTH, num_heads=layer.nheads, head_dim=layer.headdim, state_size=layer.d_state, n_groups=1,
        expand=1, conv_kernel=layer.d_conv, use_bias=False, use_conv_bias=True, layer_norm_epsilon=1e-5, chunk_size=256,
    )  # fmt: skip
    mixers = []
    for weights in layer.mamba_ssm_state_dicts():
        mixer = Mamba2Mixer(config, layer_idx=0).eval()
        mixer.load_state_dict(weights)
        mixers.append(mixer)
    return lambda x: mixers[0](x) + mixers[1](x.flip(1)).flip(1)


def against_transformers(record, layer):
    import transformers

    x = torch.randn(1, TRANSFORMERS_LENGTH, WIDTH)
    peer = two_mamba2_mixers(layer)
    torch.testing.assert_close(layer(x), peer(x), rtol=1e-4, atol=1e-4)
    works = {"bimamba2": functools.partial(layer, x), "peer": functools.partial(peer, x)}
    taken = compare(works, min_repeats=3, min_seconds=0)
    record.add(
        length=TRANSFORMERS_LENGTH, mixer="bimamba2", seconds=taken["bimamba2"].median,
        peer=f"two passes of transformers {transformers.__version__}'s Mamba2Mixer", peer_seconds=taken["peer"].median,
        speedup=taken["peer"].median / taken["bimamba2"].median,
    )  # fmt: skip


def projections(layer, x, rows):
    return layer.in_proj(x), layer.out_proj(rows)


def against_attention(record, layers, attention, length):
    x = torch.randn(1, length, WIDTH)
    works = {}
    for name, layer in layers.items():
        rows = torch.randn(1, length, layer.out_proj.in_features)
        works[name] = functools.partial(layer, x)
        works[name, "projections"] = functools.partial(projections, layer, x, rows)
    if length <= ATTENTION_UP_TO:
        works["attention"] = functools.partial(attention, x)
    limits = {"min_repeats": 11} if length < 5000 else {"min_repeats": 5, "min_seconds": 0, "warmup": 1}
    taken = compare(works, **limits)
    for name in layers:
        seconds, alone = taken[name].median, taken[name, "projections"].median
        row = dict(length=length, mixer=name, seconds=seconds, not_gemm=(seconds - alone) / seconds)
        if "attention" in taken:
            row.update(
                peer="attention layer (SDPA)", peer_seconds=taken["attention"].median,
                speedup=taken["attention"].median / seconds,
            )  # fmt: skip
        record.add(**row)


@torch.no_grad()
def body(record, lengths):
    layers = {name: get(name)(WIDTH).eval() for name in ("bimamba2", "hydra")}
    against_transformers(record, layers["bimamba2"])
    attention = attention_layer()
    for length in lengths:
        against_attention(record, layers, attention, length)


if __name__ == "__main__":
    run("layer", __doc__.splitlines()[0], [499, 1_024, 1_536, 2_999, 8_192, 16_384], body)
