#!/usr/bin/env python
"""Writes the report of the grid that run.py trains: Markdown, a plot, and one JSON file with every cell.

report.py RESULTS --name NAME    writes NAME.md, NAME.png and NAME.json from RESULTS/cells
"""

import argparse
import json
import statistics
from pathlib import Path

from run import cells

TITLES = {"word": "Words (12, speakers never heard in training)", "speaker": "Speakers (18, takes held out)"}
MODES = {"unguided": "unguided", "target_guided": "target-guided", "hybrid": "hybrid"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--name", type=Path, required=True)
    parser.add_argument("--notes", type=Path, help="Markdown to put between the summary and the tables")
    options = parser.parse_args()
    found = [json.loads(path.read_text()) for path in sorted((options.results / "cells").glob("*.json"))]
    if not found:
        parser.error(f"{options.results}: no finished cells in it")
    recipe = max((cell["recipe"] for cell in found), key=lambda r: sum(cell["recipe"] == r for cell in found))
    results = {(c["task"], c["mixer"], c["mode"], c["seed"]): c for c in found}
    options.name.parent.mkdir(parents=True, exist_ok=True)
    for cell in found:
        if cell["recipe"] == recipe:  # cells with another recipe keep theirs
            del cell["recipe"]
    document = {"recipe": recipe, "missing": missing(recipe, found), "cells": found}
    options.name.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    plot(recipe["grid"], results, options.name.with_suffix(".png"))
    notes = options.notes.read_text().strip() if options.notes else ""
    options.name.with_suffix(".md").write_text(
        markdown(document, results, notes, options.name.with_suffix(".png").name)
    )


def missing(recipe, found):
    """Returns the cells of the grid that were not run."""
    return [name for name in cells(recipe["grid"]) if name not in {cell["cell"] for cell in found}]


def rows(grid):
    return [("teacher", ""), *((mixer, mode) for mixer in grid["mixer"] for mode in grid["mode"])]


def scores(grid, results, task, mixer, mode, split="test"):
    """Returns scores in per cent, of the seeds that were run."""
    keys = [(task, mixer, mode, seed) for seed in grid["seed"]]
    return [100 * results[key][split] for key in keys if key in results]


def markdown(document, results, notes, plot_name):
    recipe = document["recipe"]
    grid, parts = recipe["grid"], ["# Whisper-tiny's encoder on the Arabic Speech Commands"]
    if notes:
        parts.append(notes)
    for task in grid["task"]:
        teacher = scores(grid, results, task, "teacher", "")
        if not teacher:
            continue
        lines = [
            "| | parameters | validation | test | to the teacher | test by seed |",
            "|---|---:|---:|---:|---:|---|",
        ]
        for mixer, mode in rows(grid):
            test = scores(grid, results, task, mixer, mode)
            if not test:
                continue
            validation = scores(grid, results, task, mixer, mode, "validation")
            parameters = next(r["parameters"] for k, r in results.items() if k[:3] == (task, mixer, mode))
            name = f"{mixer}, {MODES[mode]}" if mode else mixer
            gap = f"{statistics.mean(test) - statistics.mean(teacher):+.2f}" if mode else ""
            by_seed = ", ".join(f"{value:.2f}" for value in test)
            lines.append(f"| {name} | {parameters:,} | {spread(validation)} | {spread(test)} | {gap} | {by_seed} |")
        parts += [f"## {TITLES.get(task, task)}", "\n".join(lines)]
    parts.append(f"Accuracy in per cent, mean ± standard deviation over seeds.\n\n![Test accuracy]({plot_name})")
    for cell in document["cells"]:
        if "recipe" in cell:
            parts.append(
                f"`{cell['cell']}` was trained by another recipe: " + differences(cell["recipe"], recipe) + "."
            )
    if document["missing"]:
        parts.append("## Not run\n\n" + ", ".join(f"`{name}`" for name in document["missing"]))
    parts.append("## Provenance\n\n" + provenance(document["cells"]))
    return "\n\n".join(parts) + "\n"


def differences(own, recipe, path=""):
    """Describes the settings in which one recipe differs from the other."""
    parts = []
    for key, value in own.items():
        other = recipe.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            parts.append(differences(value, other, f"{path}{key}."))
        elif value != other:
            parts.append(f"{path}{key} {value} in place of {other}")
    return ", ".join(filter(None, parts))


def spread(values):
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def provenance(found):
    """Lists the cells' provenance, with every value where they differ, and their CPU time."""
    lines = []
    for key in found[0]["provenance"]:
        values = sorted({str(cell["provenance"][key]) for cell in found})
        if key == "finished":
            values = [values[0], values[-1]]
        joined = " to " if key == "finished" else ", "
        lines.append(f"- {key}: {joined.join(values)}")
    seconds = sum(cell["cpu_seconds"] for cell in found)
    return "\n".join([*lines, f"- cells: {len(found)}, {seconds / 3600:.1f} hours of CPU in all"])


def plot(grid, results, path):
    """Plots a panel per task: a dot per seed, a bar at the mean, the teacher's mean as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = [task for task in grid["task"] if any(key[0] == task for key in results)]
    figure, axes = plt.subplots(1, len(tasks), figsize=(6 * len(tasks), 4), layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        names, heights, dots = [], [], []
        for mixer, mode in rows(grid):
            values = scores(grid, results, task, mixer, mode)
            if values:
                names.append(f"{mixer}\n{MODES[mode]}" if mode else mixer)
                heights.append(statistics.mean(values))
                dots.append(values)
        axis.bar(names, heights, color=["0.5"] + ["tab:blue"] * (len(names) - 1), alpha=0.6)
        for index, values in enumerate(dots):
            axis.scatter([index] * len(values), values, color="black", s=12, zorder=3)
        axis.axhline(heights[0], color="0.3", linestyle=":")
        lowest = min(map(min, dots))
        axis.set(title=TITLES.get(task, task), ylabel="test accuracy, %", ylim=(max(lowest - 5, 0), 100))
        axis.tick_params(axis="x", labelrotation=60)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
