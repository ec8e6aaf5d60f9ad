"""Fits to the layer suite, from which `linconv inspect` predicts: computed from results, packaged with linconv."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from linconv.benchmarking.results import Results
from linconv.benchmarking.scaling import fit
from linconv.benchmarking.suites.layer import build
from linconv.errors import UserError

__all__ = ["write"]


def write(all_results: Sequence[Results], path: Path) -> Path:
    """Write, for each width and dtype of the layers, seconds = a + b·length + c·length² of attention and of mixers.

    Only forward passes of batch 1. Each fit includes the shortest and longest measured length, a mixer's also its
    operations for one frame.

    Raises:
        UserError: there is no layer among the results.
    """
    layers = []
    for results in all_results:
        for case, description in results.cases.items():
            if (results.suite, description["work"], description["batch"]) != ("layer", "forward", 1):
                continue
            fits = {}
            for series in results.series(case):
                name = "attention" if series.name == description["baseline"] else series.name
                lengths, seconds = series.measured()
                if (series.ours or name == "attention") and len(lengths) >= 3:
                    # Six digits, more than measurements have: the last ones change with the version of SciPy.
                    terms = [float(f"{term:.6g}") for term in fit(lengths, seconds, series.degree)]
                    fits[name] = {"seconds": terms, "shortest": min(lengths), "longest": max(lengths)}
                    fits[name]["lengths"] = len(lengths)
                if series.ours and name in fits:
                    with torch.device("meta"):
                        fits[name]["operations"] = build(name, description["facts"]["width"], 1).flops(1)
            last = results.runs[-1]
            if "attention" in fits and len(fits) > 1:
                layers.append({
                    "width": description["facts"]["width"], "dtype": description["dtype"], "fits": fits,
                    "measured_on": {
                        "device": last["gpu"] if last["device"] == "cuda" else last["cpu"],
                        "threads": None if last["device"] == "cuda" else last["threads"],
                        "date": last["date"][:10], "torch": last["torch"], "linconv": last["linconv"],
                    },
                })  # fmt: skip
    if not layers:
        raise UserError("--fits: none of the results has forward passes of layers, of attention and of a mixer")
    path.write_text(json.dumps({"layers": layers}, indent=1) + "\n")
    return path
