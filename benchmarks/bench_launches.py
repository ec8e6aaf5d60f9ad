"""Host time of Triton operators and of layers, from the call to the last launch.

    python benchmarks/bench_launches.py --out benchmarks/results/cpu/launches.json

No GPU is needed, and none is timed: kernels are compiled for sm_90 and given to a CUDA driver that launches nothing
(cuda_driver.py), so that only the host's work is left, without the real driver's. First calls are those of a new
process, with Triton's cache on disk empty and then filled; kernels and Triton's launcher are compiled in them.

Operators: batch 8 of `--lengths` frames, width 1024, heads of 64, bfloat16; Linformer has r = 256. The operator's
registration with torch adds to this. The peer is Triton's own launch of the same kernels, which looks up sizes, types
and alignment at each call. The first call of a kind is noted down besides.

Layers: 16 frames of 64 channels, bfloat16, forward without gradients and with the backward pass. torch's own kernels
run on the CPU and are timed too; the peer is Wav2Vec2's attention layer with torch's scaled_dot_product_attention.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cuda_driver
import torch

from linconv.benchmarking import compare
from linconv.benchmarking.record import run
from linconv.benchmarking.suites.layer import attention_layer, build
from linconv.ops import dispatch, triton_replay
from linconv.ops.bidirectional_ssd import triton as bidirectional_ssd
from linconv.ops.linformer import triton as linformer

BATCH, HEADS, HEADDIM, DSTATE, RANK = 8, 16, 64, 64, 256
LAYERS, LAYER_FRAMES, LAYER_WIDTH = ("hydra", "bimamba2", "linformer"), 16, 64
INF = float("inf")
FIRST_CALLS = "first-calls"  # this script as its own process, where Triton has compiled nothing yet


def cases(length):
    def random(*shape):
        return torch.randn(shape, dtype=torch.bfloat16)

    x, dt = random(BATCH, length, HEADS, HEADDIM), random(2, BATCH, length, HEADS)
    B, C = (random(2, BATCH, length, 1, DSTATE) for _ in range(2))
    A, D, dt_bias = torch.randn(3, HEADS)
    scan = (x, dt, -A.abs(), B, C, D, dt_bias, True, 0.0, INF, "shifted", None, None)
    q = random(BATCH, length, HEADS, HEADDIM).transpose(1, 2)
    proj, k = random(1, length, RANK), torch.randn(BATCH, HEADS, RANK, HEADDIM)
    attention = (q, k, k, 0.125, 0.0, None, None)
    return {
        "bidirectional_ssd": (bidirectional_ssd.bidirectional_ssd, scan),
        "bidirectional_ssd_backward": (bidirectional_ssd.bidirectional_ssd_backward, (x, *scan)),
        "linformer_project": (linformer.linformer_project, (q, proj, True, None)),
        "linformer_project_backward": (linformer.linformer_project_backward, (k, q, proj, True, None)),
        "linformer_attend": (linformer.linformer_attend, attention),
        "linformer_attend_backward": (linformer.linformer_attend_backward, (q, *attention)),
    }


def use_stub():
    stub = cuda_driver.Stub(cuda_driver.build(Path(tempfile.mkdtemp())))
    cuda_driver.make_triton_use(stub)
    return stub


def count_launches(stub, work):
    before = stub.launched.value
    work()
    return stub.launched.value - before


def first_calls(length):
    """Seconds of each operator's first call in this process, as JSON: compiling, or reading the cache, and launches."""
    use_stub()
    found = {}
    for name, (function, arguments) in cases(length).items():
        start = time.perf_counter()
        function.__wrapped__(*arguments)
        found[name] = time.perf_counter() - start
    print(json.dumps(found))


def measure_first_calls(record, length):
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        for state in ("cold", "warm"):
            command = [sys.executable, __file__, FIRST_CALLS, str(length)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            for name, seconds in json.loads(done.stdout).items():
                record.add(op=name, length=length, disk_cache=state, first_call_seconds=seconds)


def measure_operators(record, stub, length):
    for name, (function, arguments) in cases(length).items():
        calls = triton_replay.Calls(function.__wrapped__)
        works = {
            "again": lambda calls=calls, arguments=arguments: calls((), arguments),
            "worked out": lambda f=function.__wrapped__, arguments=arguments: f(*arguments),
            "noted down": lambda f=function.__wrapped__, arguments=arguments: triton_replay.Calls(f)((), arguments),
        }
        for _ in range(3):
            works["again"]()
        launches, others = (count_launches(stub, works[n]) for n in ("again", "worked out"))
        if launches != others:
            raise SystemExit(f"{name}: {launches} launches, {others} where they are worked out; no time is reported")
        taken = {n: latency.median for n, latency in compare(works, min_repeats=300, max_repeats=300).items()}
        record.add(
            op=name, length=length, launches=launches, host_seconds=taken["again"],
            first_of_a_kind_seconds=taken["noted down"], peer="Triton's launch",
            peer_seconds=taken["worked out"], speedup=taken["worked out"] / taken["again"],
        )  # fmt: skip


def take_cpu_tensors_for_cuda():
    """Operators choose and launch as on a GPU, products with weights are torch's."""
    pick = dispatch.pick
    dispatch._triton_problems[False] = None
    dispatch._gpu_problem = lambda index, architectures: None
    triton_replay.repeats = lambda tensor: True

    def picked(op, device, backend=None, **options):
        return "reference" if op == "linear" else pick(op, torch.device("cuda", 0), backend, **options)

    dispatch.pick = picked


def measure_layers(record, stub):
    take_cpu_tensors_for_cuda()
    torch.set_num_threads(1)
    x = torch.randn(1, LAYER_FRAMES, LAYER_WIDTH, dtype=torch.bfloat16)

    def works_of(module):
        def first(y):
            return y[0] if isinstance(y, tuple) else y

        def forward():
            with torch.no_grad():
                return first(module(x))

        def training():
            first(module(x)).sum().backward()

        return dict(forward=forward, training=training)

    attention = works_of(attention_layer(LAYER_WIDTH, "sdpa")[0].bfloat16())
    for name in LAYERS:
        ours = works_of(build(name, LAYER_WIDTH, LAYER_FRAMES).bfloat16())
        for kind, work in ours.items():
            for _ in range(3):
                work()
            works = {"ours": work, "attention": attention[kind]}
            taken = {n: latency.median for n, latency in compare(works, min_repeats=1000, max_repeats=1000).items()}
            record.add(
                layer=name, kind=kind, launches=count_launches(stub, work), host_seconds=taken["ours"],
                peer="attention layer", peer_seconds=taken["attention"], speedup=taken["attention"] / taken["ours"],
            )  # fmt: skip


def body(record, lengths):
    measure_first_calls(record, lengths[0])
    stub = use_stub()
    for length in lengths:
        measure_operators(record, stub, length)
    measure_layers(record, stub)


if __name__ == "__main__":
    if sys.argv[1:2] == [FIRST_CALLS]:
        first_calls(int(sys.argv[2]))
        sys.exit()
    run("launches", __doc__.splitlines()[0], [499], body)
