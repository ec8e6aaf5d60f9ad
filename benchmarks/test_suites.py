"""The cases of operators and layers under pytest-benchmark, at one short length: `make bench`. Else `linconv bench`.

    python -m pytest benchmarks -k "layer and hydra" --benchmark-autosave --benchmark-compare

Each implementation's numbers are checked before it is timed.
"""

import pytest
import torch

from linconv.benchmarking import suites
from linconv.benchmarking.suite import LARGEST, Absent, work

LENGTH = 499  # 10 s of audio


def every():
    for suite in ("scan", "selective_scan", "conv", "linformer", "loss", "layer"):
        for case in suites.get(suite):
            if case.setting.batch == LARGEST:  # which batch that is, only `linconv bench` finds out
                continue
            for implementation in case.implementations:
                name = f"{suite}: {case.key}: {implementation.name}"
                yield pytest.param(case, implementation, id=name, marks=pytest.mark.benchmark(group=case.key))


@pytest.mark.parametrize("case, implementation", every())
def test_latency(benchmark, case, implementation):
    torch.manual_seed(case.setting.seed)
    try:
        if implementation.reason:
            raise Absent(implementation.reason)
        if implementation.check is not None:
            implementation.check(case.setting)
        call = work(implementation.make, implementation.arguments, case.setting, LENGTH)
        call()
    except Absent as reason:
        pytest.skip(str(reason))
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
