"""Wav2Vec2-large (random weights) on CPU, original with SDPA against converted to BiMamba2, in one run.

    python benchmarks/bench_model.py --out benchmarks/results/cpu/model.json --lengths 499 2999 29999

Lengths are frames, 50 a second. Batch 1, fp32, no gradients. All 24 layers are timed where that is short; beyond,
models of 1 and 3 layers are, and 24 are predicted from them (rows with "predicted"): layers are alike, so time is
linear in their number. Peak memory is that of a process of its own, above model and input: of the encoder alone (its
layers work one after another, so one is enough), of a batch of two clips of which one is padded, and of the whole
model, whose convolutional front end may set it.
"""

import torch

from linconv.benchmarking import compare, peak_extra_bytes
from linconv.benchmarking.record import run
from linconv.benchmarking.suite import Setting
from linconv.benchmarking.suites.model import build, inputs

LAYERS, FULL_UP_TO = 24, 3_000
FEW, MORE = 1, 3


def model(kind, layers, frames):
    torch.manual_seed(0)
    return build("wav2vec2-large", None if kind == "original" else kind, layers, frames)


def forward(kind, layers, frames):
    net = model(kind, layers, frames)
    audio = inputs(Setting(), frames, net)

    def work():
        with torch.inference_mode():
            return net(**audio).logits

    return work


def encoder(kind, frames, padded):
    """The encoder over hidden states: one clip, or a batch of two of which the second is a tenth shorter."""
    net = model(kind, 1, frames).wav2vec2.encoder
    batch = 2 if padded else 1
    hidden = torch.randn(batch, frames, 1024)
    mask = (torch.arange(frames) < torch.tensor([[frames], [frames - frames // 10]])) if padded else None

    def work():
        with torch.inference_mode():
            return net(hidden, attention_mask=mask).last_hidden_state

    return work


def seconds(kind_layers, frames):
    works = {key: forward(*key, frames) for key in kind_layers}
    short = frames < FULL_UP_TO
    return compare(works, warmup=int(short), min_repeats=3 if short else 1, min_seconds=0)


def body(record, lengths):
    for frames in lengths:
        predicted = frames > FULL_UP_TO
        kinds = ("original", "bimamba2")
        if predicted:
            taken = seconds([(kind, n) for kind in kinds for n in (FEW, MORE)], frames)
            total = {}
            for kind in kinds:
                few, more = taken[kind, FEW].median, taken[kind, MORE].median
                total[kind] = few + (more - few) / (MORE - FEW) * (LAYERS - FEW)
                record.add(frames=frames, model=kind, layers=FEW, seconds=few)
                record.add(frames=frames, model=kind, layers=MORE, seconds=more)
        else:
            taken = seconds([(kind, LAYERS) for kind in kinds], frames)
            total = {kind: taken[kind, LAYERS].median for kind in kinds}
        record.add(
            frames=frames, model="bimamba2", layers=LAYERS, predicted=predicted, seconds=total["bimamba2"],
            peer="original (SDPA)", peer_seconds=total["original"], speedup=total["original"] / total["bimamba2"],
        )  # fmt: skip
        parts = {"encoder": (encoder, frames, False), "encoder, padded batch of 2": (encoder, frames, True)}
        for part, (make, *rest) in parts.items():
            ours, peer = (peak_extra_bytes(make, kind, *rest) for kind in ("bimamba2", "original"))
            record.add(frames=frames, part=part, extra_bytes=ours, peer="original (SDPA)", peer_extra_bytes=peer)
        ours, peer = (peak_extra_bytes(forward, kind, 1, frames) for kind in ("bimamba2", "original"))
        record.add(frames=frames, part="whole model", extra_bytes=ours, peer="original (SDPA)", peer_extra_bytes=peer)


if __name__ == "__main__":
    run("model", __doc__.splitlines()[0], [499, 2_999, 29_999], body)
