"""The demo's output, on the terminal and in ``report.md``."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from rich.console import Console
from rich.table import Table

from linconv._version import __version__
from linconv.environment import cpu_name

if TYPE_CHECKING:
    from linconv.demo.run import Results

Cells = list[list[str]]


def print_data(console: Console, results: Results) -> None:
    console.print(data_text(results))


def print_scores(console: Console, results: Results) -> None:
    console.print(_table(*scores(results)))
    console.print(SCORES_NOTE)


def print_reload(console: Console, results: Results) -> None:
    console.print(reload_text(results))


def print_speed(console: Console, results: Results) -> None:
    console.print(_table(*speed(results)))
    console.print(speed_text(results))


SCORES_NOTE = (
    "Every row saw the same clips for the same number of steps. The unguided student starts where the teacher started "
    "and never sees it; the other two start from the teacher's weights and are taught by it, the hybrid one by its "
    "hidden states for the first 60 % of the steps only."
)


def data_text(results: Results) -> str:
    lines = [
        f"{results.clips['train']} training and {results.clips['test']} held-out clips, "
        f"{len(results.classes)} classes: {', '.join(results.classes)}."
    ]
    if results.source is not None:
        lines += [f"Source: {results.source.name}.", f"Licence: {results.source.licence}."]
        lines += [f"Credit: {results.source.credit}.", "No held-out clip has words that were trained on."]
    return "\n".join(lines)


def scores(results: Results) -> tuple[list[str], Cells]:
    """Returns header and rows of the table of scores."""
    chance = 1 / len(results.classes)
    rows = [
        [row.name, f"{row.accuracy:.1%}", f"{row.steps}", f"{row.parameters:,}", f"{row.seconds:.0f} s"]
        for row in results.rows
    ]
    return ["", f"held-out accuracy (chance {chance:.0%})", "steps", "parameters", "time"], rows


def reload_text(results: Results) -> str:
    if results.reloaded:
        return "The saved student gives a fresh process the same logits, bit for bit."
    return "The saved student gives a fresh process OTHER logits: this is a bug, please report it."


def speed(results: Results) -> tuple[list[str], Cells]:
    """Returns header and rows of the table of latency and memory; predictions are marked ~."""
    header = ["audio", "teacher", "student", "speed-up", "teacher, peak", "student, peak"]
    rows = []
    for index, length in enumerate(results.latency["teacher"].lengths):
        latency = [results.latency[name].values[index] for name in ("teacher", "student")]
        row = [_duration(length)]
        for name in ("teacher", "student"):
            row.append(_marked(results.latency[name], index, f"{_seconds(results.latency[name].values[index])}"))
        row.append(f"{latency[0] / latency[1]:.2f}×")
        for name in ("teacher", "student"):
            row.append(_marked(results.memory[name], index, f"{results.memory[name].values[index] / 2**20:,.0f} MiB"))
        rows.append(row)
    return header, rows


def speed_text(results: Results) -> str:
    lengths = results.latency["teacher"].lengths
    if results.crossover is None:
        text = f"The student is not faster up to {_duration(lengths[-1])} of audio."
    elif results.crossover <= lengths[0]:
        text = f"The student is faster from {_duration(lengths[0])} of audio on, the shortest measured."
    else:
        text = f"Crossover: the student is faster from {results.crossover:.0f} s of audio on."
    curves = [*results.latency.values(), *results.memory.values()]
    if any(any(curve.predicted) for curve in curves):
        text += " Values marked ~ are predicted from a + b·length + c·length², fitted to the measured ones."
    return (
        text + " One clip, no padding. Peak memory is what resident memory rises by during the forward pass, in a "
        "process of its own; where the two are alike, the convolutional front end, which both models share, sets it."
    )


def write(results: Results, folder: Path) -> None:
    """Writes ``report.md`` and ``report.png`` into ``folder``."""
    plot(results, folder / "report.png")
    machine = (
        f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}, linconv {__version__}; seed {results.seed}; "
        f"{results.seconds / 60:.1f} minutes in all"
    )
    parts = [
        "# linconv demo: a Wav2Vec2 converted to bidirectional Mamba-2",
        machine + ".",
        "## Data",
        data_text(results).replace("\n", "  \n"),
        "## Scores",
        _markdown(*scores(results)),
        SCORES_NOTE,
        reload_text(results),
        "## Latency and peak memory",
        _markdown(*speed(results)),
        speed_text(results),
        "![Latency and peak memory against the length of the audio](report.png)",
    ]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def plot(results: Results, path: Path) -> None:
    """Plots both curves on log axes; predicted points are hollow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    panels = (
        (axes[0], results.latency, 1.0, "seconds", "Latency of a forward pass"),
        (axes[1], results.memory, 2**20, "MiB", "Peak memory of a forward pass"),
    )
    for axis, curves, unit, label, title in panels:
        for name, curve in curves.items():
            values = [value / unit for value in curve.values]
            [line] = axis.plot(curve.lengths, values, label=name)
            faces = ["white" if predicted else line.get_color() for predicted in curve.predicted]
            axis.scatter(curve.lengths, values, c=faces, edgecolors=line.get_color(), zorder=3)
        axis.set(xscale="log", yscale="log", xlabel="audio", ylabel=label, title=title)
        lengths = next(iter(curves.values())).lengths
        axis.set_xticks(lengths, map(_duration, lengths))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
        axis.legend()
    if results.crossover is not None and results.crossover > results.latency["teacher"].lengths[0]:
        axes[0].axvline(results.crossover, color="grey", linestyle=":")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _table(header: list[str], rows: Cells) -> Table:
    table = Table()
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _markdown(header: list[str], rows: Cells) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _marked(curve, index: int, text: str) -> str:
    return f"~{text}" if curve.predicted[index] else text


def _seconds(value: float) -> str:
    return f"{value * 1000:,.0f} ms" if value < 10 else f"{value:,.1f} s"


def _duration(seconds: float) -> str:
    return f"{seconds:g} s" if seconds < 60 else f"{seconds / 60:g} min"
