"""bidirectional_ssd on its Triton kernels; run by test_triton.py."""

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import NAMES, REGIMES, assert_close, oracle, scan_arguments, split, to_double, with_gradients

from linconv import ops

DIAGONALS = ("both", "once", "shifted")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    interpreter.small_scan_tiles(monkeypatch)


def on_device(arguments):
    return {n: t.to(interpreter.DEVICE) for n, t in arguments.items()}


def kernels(arguments, **options):
    tensors, rest = split(arguments)
    return ops.bidirectional_ssd(*tensors, **rest, backend="triton", **options)


def sequences(kind, batch, length):
    """Keyword arguments that say which frames are valid."""
    if kind == "seq_lens":
        return {"seq_lens": torch.tensor([length, length // 3, 0][:batch], device=interpreter.DEVICE)}
    if kind == "cu_seqlens":
        return {"cu_seqlens": torch.tensor([0, 0, length // 3, length], device=interpreter.DEVICE)}
    return {}


@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("kind", ["all", "seq_lens", "cu_seqlens"])
def test_matches_the_recurrence(regime, diagonal, kind):
    for length in (0, 1, 35):
        batch = 1 if kind == "cu_seqlens" else 3
        arguments = on_device(scan_arguments(batch, length, 2, 5, 1, 3, per_direction=REGIMES[regime]))
        options = dict(dt_softplus=True, dt_limit=(0.2, 1.5), diagonal=diagonal, **sequences(kind, batch, length))
        wanted, wanted_gradients = with_gradients(oracle, arguments, **options)
        got, gradients = with_gradients(kernels, arguments, **options)
        assert_close({"y": got, **gradients}, {"y": wanted, **wanted_gradients})
