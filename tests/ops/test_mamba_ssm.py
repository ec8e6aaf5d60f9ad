"""Backend "mamba_ssm": what stands around the package's causal scan, with our own recurrence in the package's place."""

import sys

import pytest
import torch
from scan_cases import REGIMES, scan_arguments, split

from linconv import ops
from linconv.ops import dispatch

PACKAGE = """
from linconv.ops.ssd.reference import recurrence
calls = []
def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, initial_states=None, return_final_states=False):
    assert x.shape[1] > 0 and chunk_size > 0 and return_final_states
    calls.append(tuple(x.shape))
    return recurrence(x, dt, A, B, C, initial_states=initial_states)
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A mamba_ssm that does not import, as without its CUDA extension, but whose scan does."""
    folder = tmp_path / "mamba_ssm" / "ops" / "triton"
    folder.mkdir(parents=True)
    (folder / "ssd_combined.py").write_text(PACKAGE)
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("import an_extension_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
        del sys.modules[name]


@pytest.mark.parametrize("diagonal", ["both", "once", "shifted"])
@pytest.mark.parametrize("regime", REGIMES)
def test_both_directions(package, regime, diagonal):
    tensors, rest = split(scan_arguments(2, 9, 4, 3, 2, 5, per_direction=REGIMES[regime], dtype=torch.float64))
    rest = dict(rest, diagonal=diagonal, seq_lens=torch.tensor([9, 4]), dt_softplus=True)
    got = ops.bidirectional_ssd(*tensors, **rest, backend="mamba_ssm")
    torch.testing.assert_close(got, ops.bidirectional_ssd(*tensors, **rest, backend="reference"))


@pytest.mark.parametrize("length", [0, 1, 9])
@pytest.mark.parametrize("reverse", [False, True])
def test_one_direction_and_its_states(package, length, reverse):
    tensors, rest = split(scan_arguments(2, length, 4, 3, 2, 5, dtype=torch.float64))
    states = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    rest = dict(rest, reverse=reverse, initial_states=states, return_final_states=True)
    got = ops.ssd(*tensors, **rest, backend="mamba_ssm")
    torch.testing.assert_close(got, ops.ssd(*tensors, **rest, backend="reference"))


def test_it_says_why_it_cannot_run(package, monkeypatch):
    x = torch.randn(1, 5, 4)
    with pytest.raises(ValueError, match="mamba_ssm has no short_conv"):
        ops.short_conv(x, torch.randn(4, 3), backend="mamba_ssm")
    assert ops.backends()["mamba_ssm"] == "available"
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    if not torch.cuda.is_available():
        assert "no CUDA device" in ops.backends()["mamba_ssm"]
