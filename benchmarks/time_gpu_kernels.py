"""GPU time of every kernel of the suites' implementations, by CUPTI: what is left of a call without the host.

    python benchmarks/time_gpu_kernels.py --out benchmarks/results/<gpu>/kernels.json [--suites layer --length 2999]

In bfloat16, forward and with gradients, without implementations of the whole matrix or step by step. Results are not
checked here: `linconv bench` does.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from tune_gpu_scan import kernel_times

from linconv.benchmarking import suites
from linconv.benchmarking.machine import rates
from linconv.benchmarking.record import Record
from linconv.benchmarking.suite import Absent, work

SUITES = ("conv", "linformer", "loss", "selective_scan", "layer")
SLOW = ("step by step", "doubling", "fallback", "eager", "math", "transformers")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--suites", nargs="*", choices=SUITES, default=SUITES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2999)
    options = parser.parse_args()
    record, found, seen = Record("kernels", path=options.out), rates("cuda"), set()
    for name in options.suites:
        for case in suites.get(name, "cuda"):
            setting = replace(case.setting, batch=options.batch, mixed=False, graph=False)
            if setting.dtype != "bfloat16" or (key := case.with_setting(batch=1, mixed=False, graph=False).key) in seen:
                continue
            seen.add(key)
            for implementation in case.implementations:
                if any(word in implementation.name for word in SLOW):
                    continue
                try:
                    times = kernel_times(work(implementation.make, implementation.arguments, setting, options.length))
                except (Absent, RuntimeError) as reason:  # it is not there, or has no memory for it
                    print(f"{case.key}: {implementation.name}: {str(reason).splitlines()[0]}")
                    continue
                cost = implementation.cost and implementation.cost(setting, options.length)
                record.add(
                    case=case.name, work=setting.work, batch=options.batch, length=options.length,
                    implementation=implementation.name, seconds=sum(times.values()),
                    **({"floor_seconds": cost.seconds(found)} if cost else {}),
                    **{f"{kernel[:60]} seconds": taken for kernel, taken in times.items() if taken > 5e-6},
                )  # fmt: skip
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
