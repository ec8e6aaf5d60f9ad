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
from linconv.benchmarking.suites.layer import TwoMamba2, attention_layer
from linconv.mixers import get

WIDTH = 1024
TRANSFORMERS_LENGTH = 1536
ATTENTION_UP_TO = 16_384


def against_transformers(record, layer):
    import transformers

    x = torch.randn(1, TRANSFORMERS_LENGTH, WIDTH)
    peer = TwoMamba2(layer).eval()
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
    attention, _ = attention_layer(WIDTH, "sdpa")
    for length in lengths:
        against_attention(record, layers, attention, length)


if __name__ == "__main__":
    run("layer", __doc__.splitlines()[0], [499, 1_024, 1_536, 2_999, 8_192, 16_384], body)
