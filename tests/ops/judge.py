"""How the operators' tests judge results."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch

from linconv.ops import dispatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def devices():
    """Where there are compiled kernels to judge."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


_here = "cpu"


@pytest.fixture(params=devices(), autouse=True)
def device(request, monkeypatch):
    """A test module that imports this runs once for each device: its tensors are made there."""
    if request.param == "cpu":
        yield
        return
    monkeypatch.setattr(f"{__name__}._here", request.param)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # torch's own float32 is to be float32
    torch.set_default_device(request.param)
    yield
    torch.set_default_device(None)


def here(backend="compiled"):
    """The backend of that name; "compiled" is the one of the device that the test is run for."""
    return _here if backend == "compiled" else backend


def same_bits(got, wanted):
    """Equal, NaN to NaN and the sign of zero included."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    assert torch.equal(got.contiguous().view(integer), wanted.contiguous().view(integer))


@contextlib.contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def alike_for_threads(compute, numbers=(1, 2, 5)):
    """compute() gives the same tensors, bit for bit, with any number of threads."""
    results = []
    for number in numbers:
        with threads(number):
            results.append(compute())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            same_bits(a, b)


def error(got, exact):
    return (got.double() - exact).abs().max().item() if got.numel() else 0.0


def no_worse_than_torch(got, torchs, exact, factor, what=""):
    """The error against fp64 is at most `factor` times that of torch's own operators in the same precision."""
    ours, theirs = error(got, exact), error(torchs, exact)
    assert ours <= factor * theirs, f"{what}: error {ours:.3g}, torch's own {theirs:.3g}, allowed {factor} times that"


def gradients(function, inputs, upstream):
    """Result and gradients of fresh copies of the inputs; None where an input is None."""
    inputs = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    out = function(*inputs)
    present = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad(out, present, upstream.to(out.dtype), materialize_grads=True))
    return out.detach(), [None if t is None else next(found) for t in inputs]


def on_instruction_set(name, file, selected):
    """Run the tests of `file` that match `selected` in a process whose kernels are those of instruction set `name`."""
    if here() != "cpu":
        pytest.skip("instruction sets are the CPU's")
    if dispatch.build_info()["isa"] == name:
        pytest.skip(f"{name} is that of all tests here")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", file, "-k", selected],
        env={**os.environ, "LINCONV_CPU_ISA": name, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout
