#!/usr/bin/env python
"""Writes the report of the grid that run.py trains: Markdown, a plot, and one JSON file with every cell.

report.py RESULTS --name NAME    writes NAME.md, NAME.png and NAME.json from RESULTS/cells
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import yaml
from run import cells

MODES = {"teacher": "teacher", "unguided": "unguided", "target_guided": "target-guided", "hybrid": "hybrid"}
DRAWS = 10_000


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--name", type=Path, required=True)
    parser.add_argument("--notes", type=Path, help="Markdown to put before the table")
    options = parser.parse_args()
    found = [json.loads(path.read_text()) for path in sorted((options.results / "cells").glob("*.json"))]
    if not found:
        parser.error(f"{options.results}: no finished cells in it")
    if any(cell["recipe"] != found[0]["recipe"] for cell in found):
        parser.error(f"{options.results}: its cells were trained by different recipes")
    grid = yaml.safe_load(Path(__file__).with_name("recipe.yaml").read_text())["grid"]
    missing = [name for name in cells(grid) if name not in {cell["cell"] for cell in found}]
    options.name.parent.mkdir(parents=True, exist_ok=True)
    document = {"missing": missing, "cells": found}
    options.name.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    plot(found, options.name.with_suffix(".png"))
    notes = options.notes.read_text().strip() if options.notes else ""
    options.name.with_suffix(".md").write_text(markdown(document, notes, options.name.with_suffix(".png").name))


def of_mode(found, mode):
    """{seed: cell}."""
    return {cell["seed"]: cell for cell in found if cell["mode"] == mode}


def difference(ours, theirs):
    """Mean difference in per cent points over the seeds that both have, and its paired bootstrap interval, 95 per cent.

    Sentences are drawn, and seeds: each draw takes both models of a pair on the same sentences.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    right = [[np.array([int(r) for r in side[seed]["right"]]) for side in (ours, theirs)] for seed in seeds]
    pairs = np.stack([100.0 * (a - b) for a, b in right])  # (seeds, sentences)
    draw = np.random.default_rng(0)
    means = [
        pairs[draw.integers(len(seeds), size=len(seeds))][:, draw.integers(pairs.shape[1], size=pairs.shape[1])].mean()
        for _ in range(DRAWS)
    ]
    return pairs.mean(), *np.percentile(means, [2.5, 97.5])


def markdown(document, notes, plot_name):
    found = document["cells"]
    parts = ["# MiniLM on SST-2, converted to Linformer"] + ([notes] if notes else [])
    lines = [
        "| | parameters | accuracy | to the teacher | to unguided | by seed |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for mode, title in MODES.items():
        own = of_mode(found, mode)
        if not own:
            continue
        values = [100 * cell["accuracy"] for _, cell in sorted(own.items())]
        deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        columns = [title, f"{next(iter(own.values()))['parameters']:,}", f"{statistics.mean(values):.2f}{deviation}"]
        for other in ("teacher", "unguided"):
            compared = mode not in ("teacher", other)
            gap = difference(own, of_mode(found, other)) if compared else None
            columns.append(f"{gap[0]:+.2f} [{gap[1]:+.2f}, {gap[2]:+.2f}]" if gap else "")
        columns.append(", ".join(f"{value:.2f}" for value in values))
        lines.append("| " + " | ".join(columns) + " |")
    parts.append("\n".join(lines))
    parts.append(
        "Accuracy on the 872 sentences of the development set in per cent, mean ± standard deviation over seeds; "
        f"differences with their paired bootstrap interval ({DRAWS:,} draws of seeds and sentences, 95 %).\n\n"
        f"![Accuracy]({plot_name})"
    )
    if document["missing"]:
        parts.append("## Not run\n\n" + ", ".join(f"`{name}`" for name in document["missing"]))
    parts.append("## Provenance\n\n" + provenance(found))
    return "\n\n".join(parts) + "\n"


def provenance(found):
    """What the cells have in common, and where they differ every value."""
    lines = []
    for key in found[0]["provenance"]:
        values = sorted({str(cell["provenance"][key]) for cell in found})
        if key == "finished":
            values = [values[0], values[-1]]
        lines.append(f"- {key}: {(' to ' if key == 'finished' else ', ').join(values)}")
    minutes = sum(cell["cpu_seconds"] for cell in found) / 60
    return "\n".join([*lines, f"- cells: {len(found)}, {minutes:.0f} minutes of CPU in all"])


def plot(found, path):
    """A dot a seed, a bar at the mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [mode for mode in MODES if of_mode(found, mode)]
    values = [[100 * cell["accuracy"] for cell in of_mode(found, mode).values()] for mode in shown]
    figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
    axis.bar([MODES[mode] for mode in shown], [statistics.mean(v) for v in values], color="tab:blue", alpha=0.6)
    for index, dots in enumerate(values):
        axis.scatter([index] * len(dots), dots, color="black", s=12, zorder=3)
    axis.set(title="SST-2", ylabel="accuracy, %", ylim=(max(min(map(min, values)) - 5, 0), 100))
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
