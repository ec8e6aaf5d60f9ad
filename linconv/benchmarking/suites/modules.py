"""Shared parts of the layer and model suites: checks of modules, and masks of batches of mixed lengths."""

import contextlib
import copy
from unittest import mock

import torch

from linconv.benchmarking.suite import judge
from linconv.ops import dispatch


@contextlib.contextmanager
def reference_kernels():
    """Context in which every operator of linconv runs on its plain torch reference."""
    with mock.patch.object(dispatch, "pick", lambda *args, **kwargs: "reference"):
        yield


def check_module(module, call, tensors):
    """Check the module on compiled kernels against itself on plain torch in float64; ``call(module, *tensors)``.

    Raises:
        CheckFailed: see `judge`.
    """
    copies = {}

    def at(dtype):
        if dtype not in copies:
            copies[dtype] = copy.deepcopy(module).to(dtype)
        return copies[dtype]

    def ours(*given):
        return call(at(given[0].dtype), *given)

    def plain(*given):
        with reference_kernels():
            return call(at(given[0].dtype), *given)

    judge(ours, plain, plain, tensors)


def key_mask(seq_lens, length, implementation, dtype):
    """The mask over keys for attention layers of transformers, broadcast over heads and queries, or None."""
    if seq_lens is None:
        return None
    keep = (torch.arange(length, device=seq_lens.device) < seq_lens[:, None])[:, None, None]  # (batch, 1, 1, length)
    if implementation == "sdpa":
        return keep.expand(-1, 1, length, -1)
    return torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill(~keep, torch.finfo(dtype).min)
