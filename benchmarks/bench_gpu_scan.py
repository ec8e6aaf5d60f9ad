"""bidirectional_ssd on a GPU against two causal passes with flips and exact attention, in one run.

    python benchmarks/bench_gpu_scan.py --widths 768 --out benchmarks/results/<gpu>/bidirectional_ssd_768.json

The regime is hydra (x shared; dt, B, C per direction), bfloat16, batch 8, headdim 64. No speed is reported of a width
whose results or gradients are wrong, nor of a peer whose are. Rows of "plans" set both plans of forward side by side
over batches; all others are of the plan that is chosen. Times are of calls, as peers' are; ours are timed as replays of
a CUDA graph too, since short calls take what Python takes. Floors are the least bytes of forward at the rate of a large
copy in the same run. Memory is what is allocated at its highest beyond arguments, results and gradients. First calls
are of a process of their own, with Triton's cache on disk empty and then full.
Peers, each as a row of its own with the ratio of its time to ours:

- cuda: our own fused kernel, forward, and the same gradients; where the CUDA library is loaded.
- two passes: `linconv.ops.ssd` forward, and over flipped copies, summed; ours, for want of a better one.
- mamba_ssm: the same with mamba_ssm's chunk scan, where it can be imported.
- simple_gla: flash-linear-attention's, one causal pass counted twice, forward, where it can be imported.
- sdpa flash, sdpa cudnn: exact attention of torch of the same width; one over the same frames.
"""

import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from linconv import ops
from linconv.benchmarking.latency import graphed
from linconv.benchmarking.machine import rates
from linconv.benchmarking.memory import peak_extra_cuda_bytes
from linconv.benchmarking.record import run
from linconv.benchmarking.suite import Absent
from linconv.benchmarking.suites.peers import need

BATCH, HEADDIM = 8, 64
DSTATES = {768: 64, 1024: 128}  # by width
ATTENTION_UP_TO = 16_384
PLANS = ("chunks", "sweeps")
PLAN_BATCHES = (1, 2, 4, 8, 16, 32)  # rows for PROGRAMS_TO_SWEEP of linconv/ops/ssd/triton_tiles.py to be set by
PLAN_FRAMES = 2**17  # in a batch at most
FIRST_CALLS = "first-calls"
DRAWS = 3  # that correctness is judged by
FORWARD_ONLY = ("simple_gla",)  # fla 0.6 refuses its backward pass on Hopper with Triton 3.4 to 3.7.0


def arguments(width, dstate, length, batch=BATCH, dtype=torch.bfloat16):
    heads = width // HEADDIM

    def tensor(*shape):
        return torch.randn(*shape, device="cuda", dtype=dtype)

    x, dt = tensor(batch, length, heads, HEADDIM), tensor(2, batch, length, heads) - 3
    A = -torch.rand(2, heads, device="cuda") - 1
    return x, dt, A, tensor(2, batch, length, 1, dstate), tensor(2, batch, length, 1, dstate)


def ours(x, dt, A, B, C):
    return ops.bidirectional_ssd(x, dt, A, B, C, dt_softplus=True, backend="triton")


def by_plan(plan):
    """Ours by a plan, whichever would be chosen."""

    def planned(*tensors):
        os.environ["LINCONV_SCAN_PLAN"] = plan
        try:
            return ours(*tensors)
        finally:
            del os.environ["LINCONV_SCAN_PLAN"]

    return planned


def two_passes(scan):
    def passes(x, dt, A, B, C):
        forward = scan(x, dt[0], A[0], B[0], C[0])
        return forward + scan(*(t.flip(1) for t in (x, dt[1])), A[1], *(t.flip(1) for t in (B[1], C[1]))).flip(1)

    return passes


def linear_peers():
    """Peers by name, as functions of the same arguments."""
    peers = {"two passes": two_passes(lambda *t: ops.ssd(*t, dt_softplus=True, backend="triton"))}
    state = ops.backends()["cuda"]
    if state == "available":
        peers["cuda"] = functools.partial(ops.bidirectional_ssd, dt_softplus=True, backend="cuda")
    else:
        print(f"not compared with our own cuda: {state}")
    try:
        causal = need("mamba_ssm.ops.triton.ssd_combined", "cuda").mamba_chunk_scan_combined
        peers["mamba_ssm"] = two_passes(lambda *t: causal(*t, chunk_size=256, dt_softplus=True))
    except Absent as reason:
        print(f"not compared with mamba_ssm: {reason}")
    try:
        chunk_simple_gla = need("fla.ops.simple_gla", "cuda").chunk_simple_gla
    except Absent as reason:
        print(f"not compared with simple_gla: {reason}")
    else:

        def gla(x, dt, A, B, C):
            step = F.softplus(dt[0].float())
            key = B[0].expand(-1, -1, x.shape[2], -1)
            query = C[0].expand_as(key)
            return chunk_simple_gla(query, key, x * step[..., None].to(x.dtype), g=step * A[0], scale=1.0)[0]

        peers["simple_gla"] = gla
    return peers


def plain(x, dt, A, B, C):
    """The same chunked products in plain torch, in bfloat16 as tensor cores take them."""
    with torch.autocast("cuda", torch.bfloat16):
        return ops.bidirectional_ssd(x, dt, A, B, C, dt_softplus=True, backend="reference")


def results(function, tensors, backward=True):
    """The result of function(*tensors) by name, and with backward the gradients of what it depends on."""
    if not backward:
        return {"y": function(*tensors)}
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    torch.manual_seed(0)
    upstream = torch.randn(y.shape, device="cuda").bfloat16().to(y)  # the same in every precision
    gradients = torch.autograd.grad(y, leaves, upstream, allow_unused=True)
    return {"y": y, **{n: g for n, g in zip(("dx", "ddt", "dA", "dB", "dC"), gradients) if g is not None}}


def errors(got, exact):
    return {name: (value.double() - exact[name]).abs().max().item() for name, value in got.items()}


def worst(mine, torchs):
    """(what, its error over the error allowed) of the result or gradient that is worst, each error that of all draws.

    Allowed is twice the error of plain torch at this precision, thrice in gradients.
    """
    ratios = {}
    for name in mine[0]:
        ours, theirs = (max(draw[name] for draw in draws) for draws in (mine, torchs))
        # NaN is no maximum of max().
        wrong = any(math.isnan(draw[name]) for draw in mine)
        ratios[name] = float("inf") if wrong else ours / max((2 if name == "y" else 3) * theirs, 1e-30)
    return max(ratios.items(), key=lambda item: item[1])


def check(width, dstate, peers):
    """The peers whose results and gradients are right; an end where ours are not, so that no speed is reported.

    Of several draws the worst: A has so few elements that one draw would compare luck.
    """

    def exact(x, dt, A, B, C):
        return ops.bidirectional_ssd(x, dt, A, B, C, dt_softplus=True, backend="reference")

    def exact_one_way(x, dt, A, B, C):
        return ops.ssd(x, dt[0], A[0], B[0], C[0], dt_softplus=True, backend="reference")

    def plain_one_way(*tensors):
        with torch.autocast("cuda", torch.bfloat16):
            return exact_one_way(*tensors)

    planned = {plan: by_plan(plan) for plan in PLANS}
    both, one_way = (exact, plain, {**planned, **peers}), (exact_one_way, plain_one_way, {})
    if "simple_gla" in peers:
        one_way[2]["simple_gla"] = both[2].pop("simple_gla")
    found = {}
    for reference, torchs, judged in (both, one_way):
        mine, theirs = {name: [] for name in judged}, []
        for seed in range(DRAWS if judged else 0):
            torch.manual_seed(seed)
            tensors = arguments(width, dstate, 499, batch=2)
            truth = results(reference, [t.double() for t in tensors])
            theirs.append(errors(results(torchs, tensors), truth))
            for name in list(mine):
                plan = {"LINCONV_SCAN_PLAN": name} if name in PLANS else {}  # of backward too
                try:
                    with mock.patch.dict(os.environ, plan):
                        got = results(judged[name], tensors, backward=name not in FORWARD_ONLY)
                    mine[name].append(errors(got, truth))
                except Exception as error:
                    if name in PLANS:
                        raise
                    del mine[name]
                    print(f"not compared with {name} at d = {width}: {type(error).__name__}: {error}")
        found |= {name: worst(draws, theirs) for name, draws in mine.items()}
    right = {}
    for name, (what, ratio) in found.items():
        if name in PLANS:
            if ratio > 1:
                raise SystemExit(
                    f"d = {width}, {name}: {what} has {ratio:.2f} times the error allowed; no speed is reported"
                )
        # A peer may round more than we do; that is no reason to leave it out.
        elif ratio > (1 if name == "cuda" else 3):
            print(f"not compared with {name} at d = {width}: {what} has {ratio:.1f} times the error allowed")
        else:
            right[name] = peers[name]
    return right


def seconds(work):
    from triton.testing import do_bench

    return do_bench(work, return_mode="median") / 1e3


def with_backward(function, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    upstream = torch.randn_like(function(*leaves))

    def work():
        y = function(*leaves)
        return y, *torch.autograd.grad(y, leaves, upstream, allow_unused=True)

    return work


def least_bytes(width, dstate, length):
    """Of forward in bfloat16: x and y, dt of both directions, B and C of both, one group."""
    return BATCH * length * (4 * width + 4 * width // HEADDIM + 8 * dstate)


def extra_bytes(work):
    """At its highest, beyond the arguments and what the work returns: results, gradients."""
    kept = []
    peak = peak_extra_cuda_bytes(lambda: kept.append(work()))
    returned = kept[0] if isinstance(kept[0], tuple) else kept
    return max(0, peak - sum(t.nbytes for t in returned if t is not None))


def first_calls(width):
    """Seconds of the first forward and the first backward pass in this process, as JSON."""
    leaves = [t.requires_grad_() for t in arguments(width, DSTATES[width], 499)]
    torch.cuda.synchronize()
    found = {}
    start = time.perf_counter()
    y = ours(*leaves)
    torch.cuda.synchronize()
    found["forward"] = time.perf_counter() - start
    start = time.perf_counter()
    torch.autograd.grad(y, leaves, y.detach())
    torch.cuda.synchronize()
    found["backward"] = time.perf_counter() - start
    print(json.dumps(found))


def time_first_calls(record, width):
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        for state in ("cold", "warm"):
            command = [sys.executable, __file__, FIRST_CALLS, str(width)]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            for name, taken in json.loads(done.stdout.splitlines()[-1]).items():
                record.add(width=width, part="first call", work=name, disk_cache=state, first_call_seconds=taken)


def time_plans(record, width, dstate, length, base):
    """Forward by each plan, over batches, of which the programs of a sweep are a multiple."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    for batch in PLAN_BATCHES:
        if batch * length > max(PLAN_FRAMES, length):
            break
        tensors = arguments(width, dstate, length, batch)
        taken = {plan: seconds(lambda: by_plan(plan)(*tensors)) for plan in PLANS}  # noqa: B023
        record.add(
            **base, part="plans", batch=batch, heads=width // HEADDIM, multiprocessors=multiprocessors, **taken,
            sweeps_over_chunks=taken["sweeps"] / taken["chunks"],
        )  # fmt: skip


def body(record, lengths, widths):
    os.environ.pop("LINCONV_SCAN_PLAN", None)
    copy = rates("cuda")["copy"]
    for width in widths:
        dstate = DSTATES[width]
        peers = check(width, dstate, linear_peers())
        for length in lengths:
            tensors = arguments(width, dstate, length)
            base = dict(width=width, length=length, gpu=torch.cuda.get_device_name())
            time_plans(record, width, dstate, length, base)
            taken = {}
            for part in ("forward", "training"):
                work = (lambda: ours(*tensors)) if part == "forward" else with_backward(ours, tensors)  # noqa: B023
                taken[part] = seconds(work)
                row = dict(seconds=taken[part], extra_bytes=extra_bytes(work), graph_seconds=seconds(graphed(work)))
                if part == "forward":
                    floor = least_bytes(width, dstate, length) / copy
                    row |= dict(floor_seconds=floor, over_floor=taken[part] / floor)
                record.add(**base, part=part, **row)
                for name, peer in peers.items():
                    if part == "training" and name in FORWARD_ONLY:
                        continue
                    work = (lambda: peer(*tensors)) if part == "forward" else with_backward(peer, tensors)  # noqa: B023
                    passes = 2 if name == "simple_gla" else 1
                    peer_seconds = passes * seconds(work)
                    record.add(
                        **base, part=part, peer=name, peer_seconds=peer_seconds,
                        speedup=peer_seconds / taken[part], peer_extra_bytes=extra_bytes(work),
                    )  # fmt: skip
            if length > ATTENTION_UP_TO:
                continue
            q, k, v = (
                torch.randn(BATCH, width // HEADDIM, length, HEADDIM, device="cuda", dtype=torch.bfloat16)
                for _ in range(3)
            )
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                name = f"sdpa {backend.name.split('_')[0].lower()}"
                try:
                    with sdpa_kernel(backend):
                        for part, work in (
                            ("forward", lambda: F.scaled_dot_product_attention(q, k, v)),  # noqa: B023
                            ("training", with_backward(F.scaled_dot_product_attention, (q, k, v))),
                        ):
                            peer_seconds = seconds(work)
                            record.add(
                                **base, part=part, peer=name, peer_seconds=peer_seconds,
                                speedup=peer_seconds / taken[part],
                            )  # fmt: skip
                except RuntimeError as error:  # the backend does not take this, or has no memory for it
                    print(f"not compared with {name} at {length} frames: {str(error).splitlines()[0]}")
        time_first_calls(record, width)


if __name__ == "__main__":
    if sys.argv[1:2] == [FIRST_CALLS]:
        first_calls(int(sys.argv[2]))
        sys.exit()
    run("bidirectional_ssd", __doc__.splitlines()[0], [499, 1_000, 3_000, 16_000, 64_000], body, widths=list(DSTATES))
