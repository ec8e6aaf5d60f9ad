"""ssd on its Triton kernels; run by test_triton.py."""

import interpreter
import pytest
import torch
from scan_cases import assert_close, oracle_one_direction, scan_arguments, split, with_gradients

from linconv import ops


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    interpreter.small_scan_tiles(monkeypatch)


def on_device(arguments):
    return {n: t.to(interpreter.DEVICE) for n, t in arguments.items()}


def kernels(arguments, **options):
    arguments = dict(arguments)
    states = {"initial_states": arguments.pop("initial_states", None)}
    tensors, rest = split(arguments)
    return ops.ssd(*tensors, **rest, **states, return_final_states=True, backend="triton", **options)


def oracle(arguments, **options):
    arguments = dict(arguments)
    states = arguments.pop("initial_states", None)
    return oracle_one_direction(arguments, initial_states=states, **options)


@pytest.mark.parametrize(
    "kind, reverse, started, groups, length",
    [("all", False, True, 1, 35), ("seq_lens", True, True, 2, 35), ("cu_seqlens", True, False, 1, 35),
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
    (y, states), gradients = with_gradients(kernels, arguments, **options)
    (wanted_y, wanted_states), wanted = with_gradients(oracle, arguments, **options)
    assert_close({"y": y, "states": states, **gradients}, {"y": wanted_y, "states": wanted_states, **wanted})


def test_padding_is_never_read():
    arguments = scan_arguments(2, 40, 1, 5, 1, 3, dtype=torch.float32)
    arguments["initial_states"] = torch.randn(2, 1, 5, 3)
    arguments = on_device(arguments)
    for name in ("x", "dt", "B", "C"):
        arguments[name][1, 17:] = float("nan")
    for reverse in (False, True):
        y, states = kernels(arguments, seq_lens=torch.tensor([40, 17], device=interpreter.DEVICE), reverse=reverse)
        own = {n: t[1:, :17] if n in ("x", "dt", "B", "C") else t for n, t in arguments.items()}
        own["initial_states"] = arguments["initial_states"][1:]
        alone, alone_states = kernels(own, reverse=reverse)
        assert torch.equal(y[1:, :17], alone) and torch.equal(states[1:], alone_states)
        assert not y[1, 17:].any()
