"""ssd on its Triton kernels; run by test_triton.py."""

import dataclasses
import math

import interpreter
import pytest
import torch
from scan_cases import NAMES, REGIMES, assert_close, oracle_one_direction, scan_arguments, split, with_gradients

from linconv import ops


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    interpreter.small_scan_tiles(monkeypatch)


def on_device(arguments):
    return {n: t.to(interpreter.DEVICE) for n, t in arguments.items()}


def kernels(arguments, plan="chunks", **options):
    arguments = dict(arguments)
    states = {"initial_states": arguments.pop("initial_states", None)}
    tensors, rest = split(arguments)
    with interpreter.by_plan(plan):
        return ops.ssd(*tensors, **rest, **states, return_final_states=True, backend="triton", **options)


def oracle(arguments, **options):
    arguments = dict(arguments)
    states = arguments.pop("initial_states", None)
    return oracle_one_direction(arguments, initial_states=states, **options)


@pytest.mark.parametrize(
    "kind, reverse, started, groups, length",
    [("all", False, True, 1, 20), ("seq_lens", True, True, 2, 20), ("cu_seqlens", True, False, 1, 20),
     ("cu_seqlens", False, True, 1, 17), ("all", True, True, 1, 0)],
)  # fmt: skip
def test_matches_the_recurrence(kind, reverse, started, groups, length):
    batch = 1 if kind == "cu_seqlens" else 2
    arguments = scan_arguments(batch, length, 2 * groups, 17, groups, 5, strided=started)
    options = dict(dt_softplus=True, reverse=reverse)
    if kind == "seq_lens":
        options["seq_lens"] = torch.tensor([length, length // 3], device=interpreter.DEVICE)
    if kind == "cu_seqlens":
        options["cu_seqlens"] = torch.tensor([0, 0, length // 3, length], device=interpreter.DEVICE)
    if started:
        states = torch.randn(5, 17, 3 if kind == "cu_seqlens" else batch, 2 * groups, dtype=torch.float64)
        arguments["initial_states"] = states.permute(2, 3, 1, 0)
    arguments = on_device(arguments)
    (wanted_y, wanted_states), wanted = with_gradients(oracle, arguments, **options)
    for plan in interpreter.SCAN_PLANS:
        with interpreter.by_plan(plan):  # backward too
            (y, states), gradients = with_gradients(kernels, arguments, plan=plan, **options)
        assert_close({"y": y, "states": states, **gradients}, {"y": wanted_y, "states": wanted_states, **wanted})


@pytest.mark.parametrize("plan", interpreter.SCAN_PLANS)
@pytest.mark.parametrize("bounds", [dict(seq_lens=[20, 7]), dict(cu_seqlens=[0, 7, 20])])
def test_lengths_that_are_apart_in_memory(bounds, plan):
    ((name, values),) = bounds.items()
    arguments = on_device(scan_arguments(1 if name == "cu_seqlens" else 2, 20, 1, 5, 1, 3))
    together = torch.tensor(values, device=interpreter.DEVICE)
    apart = torch.stack([together, together + 100], 1)[:, 0]
    for got, wanted in zip(*(kernels(arguments, plan, **{name: given}) for given in (apart, together))):
        assert torch.equal(got, wanted)


@interpreter.calls_are_repeated
def test_a_call_seen_before_takes_its_own_tensors():
    """Seen once, noted down, done again (triton_replay.py)."""
    for seed in range(interpreter.CALLS):
        torch.manual_seed(seed)
        arguments = scan_arguments(2, 9, 2, 5, 1, 3)
        arguments = on_device(dict(arguments, initial_states=torch.randn(2, 2, 5, 3, dtype=torch.float64)))
        (y, states), gradients = with_gradients(kernels, arguments)
        (wanted_y, wanted_states), wanted = with_gradients(oracle, arguments)
        assert_close({"y": y, "states": states, **gradients}, {"y": wanted_y, "states": wanted_states, **wanted})


@pytest.mark.parametrize("plan", interpreter.SCAN_PLANS)
def test_padding_is_never_read(plan):
    arguments = scan_arguments(2, 40, 1, 5, 1, 3, dtype=torch.float32)
    arguments["initial_states"] = torch.randn(2, 1, 5, 3)
    arguments = on_device(arguments)
    for name in ("x", "dt", "B", "C"):
        arguments[name][1, 17:] = float("nan")
    for reverse in (False, True):
        lengths = torch.tensor([40, 17], device=interpreter.DEVICE)
        y, states = kernels(arguments, plan, seq_lens=lengths, reverse=reverse)
        own = {n: t[1:, :17] if n in ("x", "dt", "B", "C") else t for n, t in arguments.items()}
        own["initial_states"] = arguments["initial_states"][1:]
        alone, alone_states = kernels(own, plan, reverse=reverse)
        assert torch.equal(y[1:, :17], alone) and torch.equal(states[1:], alone_states)
        assert not y[1, 17:].any()


@pytest.mark.parametrize(
    "setting, products, tolerance", [("highest", "ieee", 1e-5), ("high", "tf32x3", 1e-5), ("medium", "tf32", 5e-3)]
)
def test_products_are_as_torch_is_told(setting, products, tolerance):
    """Errors of the largest result. Three TF32 products keep what float32 has, one keeps ten bits."""
    from linconv.ops.ssd.triton import Scan

    exact = on_device(scan_arguments(2, 40, 2, 17, 1, 20))
    (wanted, _), wanted_gradients = with_gradients(oracle, exact)
    arguments = {n: t.float() for n, t in exact.items()}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        tensors = [arguments[n].to("meta") for n in NAMES]
        assert Scan(*tensors, False, 0.0, 1.0, None, None, None, directions=1).precision == products
        found = {}
        for plan in interpreter.SCAN_PLANS:
            with interpreter.by_plan(plan):
                (y, _), gradients = with_gradients(kernels, arguments, plan=plan)
            found |= {(plan, name): value for name, value in {"y": y, **gradients}.items()}
    finally:
        torch.set_float32_matmul_precision(before)
    wanted = {"y": wanted, **wanted_gradients}
    for (plan, name), got in found.items():
        assert (got - wanted[name]).abs().max() <= tolerance * wanted[name].abs().max(), (plan, name)


def test_sweeps_are_taken_where_they_fill_the_gpu(monkeypatch):
    from linconv.ops.ssd.triton_tiles import PROGRAMS_TO_SWEEP, choose_plan

    monkeypatch.delenv("LINCONV_SCAN_PLAN", raising=False)
    for major, least in PROGRAMS_TO_SWEEP.items():
        assert choose_plan(100 * least, 100, 10 * major, "tf32") == "sweeps"
        assert choose_plan(100 * least - 1, 100, 10 * major, "tf32") == "chunks"
        assert choose_plan(100 * least, 100, 10 * major, "ieee") == "chunks"
    assert choose_plan(10**6, 100, 120, "tf32") == "sweeps"  # no row of its own
    assert choose_plan(10**6, 0, 90, "tf32") == "chunks"  # no GPU


def test_heads_of_a_program_by_the_programs_there_are():
    from linconv.ops.ssd.triton import Scan

    arguments = scan_arguments(1, 40, 12, 16, 2, 8)
    one = Scan(*[arguments[n].to("meta") for n in NAMES], False, 0.0, 1.0, None, None, None, directions=1)
    one.tiles = dataclasses.replace(one.tiles, heads=16, resident=2)
    assert one.heads_of_outputs(1) == 6  # no GPU: all of a group
    one.multiprocessors = 100
    found = [one.heads_of_outputs(programs) for programs in (0, 1, 16, 30, 66, 100, 100_000)]
    assert found == [6, 1, 1, 2, 6, 6, 6]
    one.tiles = dataclasses.replace(one.tiles, heads=4)
    assert one.heads_of_outputs(100_000) == 3  # a divisor of the group's


def test_plan_by_environment(monkeypatch):
    from linconv.ops.ssd.triton_tiles import PLANS, choose_plan

    assert PLANS == interpreter.SCAN_PLANS
    for plan in PLANS:
        monkeypatch.setenv("LINCONV_SCAN_PLAN", plan)
        assert {choose_plan(n, 100, 90, p) for n in (1, 10**6) for p in ("ieee", "tf32")} == {plan}
    monkeypatch.setenv("LINCONV_SCAN_PLAN", "sweep")
    with pytest.raises(ValueError, match="LINCONV_SCAN_PLAN is 'sweep', wanted one of 'chunks', 'sweeps', or nothing"):
        choose_plan(1, 100, 90, "tf32")


@pytest.mark.parametrize("regime", ["hydra", "separate"])
def test_launches_of_each_plan(monkeypatch, regime):
    """Three at most forward, six backward; programs are counted for the choice as they are launched."""
    from linconv.ops.ssd import triton as scan

    counted, launched = [], []
    monkeypatch.setattr(scan, "choose_plan", lambda programs, *_: counted.append(programs) or "sweeps")
    arguments = scan_arguments(3, 40, 4, 20, 2, 3, per_direction=REGIMES[regime])
    tensors = [arguments[n].to("meta") for n in NAMES]
    one = scan.Scan(*tensors, False, 0.0, 1.0, None, None, None, directions=2)
    monkeypatch.setattr(
        scan, "launch", lambda kernel, grid, *_, **__: launched.append((kernel.__name__, math.prod(grid)))
    )
    scan.scan_forward(one)
    assert [name for name, _ in launched] == ["chunk_decays", "sweep_states", "chunk_outputs"]
    tiles = math.ceil(20 / one.tiles.sweep_p) * math.ceil(3 / one.tiles.sweep_n)
    assert {programs for name, programs in launched if name == "sweep_states"} == {*counted} == {3 * 4 * 2 * tiles}
    launched.clear()
    scan.scan_backward(one, one.empty(*one.x.shape))
    assert [name for name, _ in launched] == [
        "chunk_decays", "sweep_states", "chunk_gradients", "chunk_outputs", "step_gradients", "sum_parts",
    ]  # fmt: skip
    launched.clear()
    chunks = dataclasses.replace(one, plan="chunks")
    scan.scan_forward(chunks)
    assert [name for name, _ in launched] == ["chunk_states", "pass_states", "chunk_outputs"]
    launched.clear()
    scan.scan_backward(chunks, one.empty(*one.x.shape))
    assert [name for name, _ in launched] == [
        "chunk_states", "pass_states", "chunk_gradients", "chunk_outputs", "step_gradients", "sum_parts",
    ]  # fmt: skip
