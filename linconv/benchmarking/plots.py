"""Plots of results on log axes. Hollow markers and dashed lines are predicted, half-filled ones composed of blocks."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path

from linconv.benchmarking.analysis import crossovers, over_floor, speedup
from linconv.benchmarking.results import Results, Series, measured_on
from linconv.errors import UserError

__all__ = ["case_png", "case_svg", "duration", "overview"]

_OURS = ("#0b6e99", "#d1495b", "#2e933c", "#7b3fa0")
_PEERS = ("#3d3d3d", "#8a8a8a", "#b8860b", "#6b8fb3", "#a05a2c", "#888844", "#c27ba0")
_SECONDS = (5, 30, 120, 600, 3600)
_README_LAYER = "layer of width 1024, forward, float32, batch 1"


def duration(seconds: float) -> str:
    """5 s, 30 s, 10 min, 1 h: two digits, for reading, not for arithmetic."""
    for unit, size in (("s", 1), ("min", 60), ("h", 3600)):
        if float(f"{seconds:.2g}") < 60 * size or unit == "h":
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"


def case_svg(results: Results, case: str) -> str:
    """The four panels of a case as an ``<svg>`` element, with text kept as text."""
    pyplot = _pyplot()
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": case}):
        figure = _case_figure(pyplot, results, case)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def case_png(results: Results, case: str, path: Path) -> Path:
    pyplot = _pyplot()
    figure = _case_figure(pyplot, results, case)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


def overview(all_results: Sequence[Results], path: Path) -> Path:
    """The README's plot: latency of a layer, and speed-up of layers and models over exact attention, with length.

    Raises:
        UserError: the results have no layer of width 1024, or none with attention, or the path is not that of a PNG.
    """
    if path.suffix.lower() != ".png":  # matplotlib would add a suffix to a name without one
        raise UserError(f"--out: got {path}; want a name that ends in .png")
    pyplot = _pyplot()
    found = {case: results for results in all_results for case in results.cases}
    if _README_LAYER not in found:
        raise UserError(f"--plot: no result has the case {_README_LAYER!r}")
    results = found[_README_LAYER]
    series = {s.name: s for s in results.series(_README_LAYER)}
    attention = results.cases[_README_LAYER]["baseline"]
    if attention not in series:
        raise UserError(f"--plot: no result has {attention} in the case {_README_LAYER!r}")
    baseline = series[attention]
    rate = results.cases[_README_LAYER]["units_per_second"]
    with pyplot.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
        names = {"bimamba2": "BiMamba2", "hydra": "Hydra", "linformer": "Linformer", baseline.name: "attention (SDPA)"}
        colors = dict(zip((n for n in names if n in series and series[n].ours), _OURS)) | {baseline.name: _PEERS[0]}
        for name in names:
            if name in series:
                s = series[name]
                _curve(left, _times(s.lengths, rate), s.seconds, s.predicted, s.composed, colors[name], names[name])
        for crossing in crossovers(results, _README_LAYER):
            if crossing.length and crossing.length > crossing.shortest:
                x, color = crossing.length / rate, colors[crossing.name]
                left.axvline(x, color=color, linestyle=":", linewidth=1.2)
                place = list(colors).index(crossing.name)
                left.annotate(
                    f"{names[crossing.name]} faster\nfrom {duration(x)}", (x, 0.97 - 0.13 * place), color=color,
                    xycoords=("data", "axes fraction"), xytext=(4, 0), textcoords="offset points", va="top",
                    fontsize=10,
                )  # fmt: skip
        left.set(title="Latency of one layer of width 1024", ylabel="seconds")
        colors = iter((*_OURS, *_PEERS[2:]))
        for case, name, label in _compared(found):
            s, base = _pair(found[case], case, name)
            ratio = speedup(s, base)
            rows = [n in ratio for n in s.lengths]
            x, why, composed = (
                [v for v, keep in zip(col, rows) if keep] for col in (s.lengths, s.predicted, s.composed)
            )
            theirs = dict(zip(base.lengths, base.predicted))
            why = [w or theirs[n] for n, w in zip(x, why)]
            _curve(right, _times(x, rate), [ratio[n] for n in x], why, composed, next(colors), label)
        right.axhline(1, color="#3d3d3d", linewidth=1)
        right.set(title="Speed-up over exact attention", ylabel="times as fast")
        for axis in (left, right):
            _log_axes(axis, rate, "length of the audio")
            axis.legend(frameon=False, fontsize=10, loc="lower right" if axis is left else "upper left")
        right.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        figure.supxlabel(
            _machine(results)
            + "; forward, batch 1, float32; hollow: predicted by a fit; half-filled: one block times their number",
            fontsize=9,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _compared(found: dict[str, Results]):
    """(case, implementation, label) of the README's second panel: the layers, then whole models."""
    layers = {s.name for s in found[_README_LAYER].series(_README_LAYER)}
    for name, label in (("bimamba2", "BiMamba2, layer"), ("hydra", "Hydra, layer")):
        if name in layers:
            yield _README_LAYER, name, label
    for case, results in found.items():
        description = results.cases[case]
        plain = (description["work"], description["dtype"], description["batch"]) == ("forward", "float32", 1)
        names = {s.name for s in results.series(case)}
        if results.suite == "model" and plain and {"bimamba2", description["baseline"]} <= names:
            yield case, "bimamba2", f"BiMamba2, {description['name']}"


def _pair(results: Results, case: str, name: str) -> tuple[Series, Series]:
    series = {s.name: s for s in results.series(case)}
    return series[name], series[results.cases[case]["baseline"]]


def _machine(results: Results) -> str:
    last = results.runs[-1]
    return f"{measured_on(last)}, torch {last['torch']}, {last['date'][:10]}"


# ---- The panels of a case


def _case_figure(pyplot, results: Results, case: str):
    description = results.cases[case]
    series = list(results.series(case))
    baseline = next((s for s in series if s.name == description["baseline"]), None)
    ours, peers = iter(itertools.cycle(_OURS)), iter(itertools.cycle(_PEERS))
    colors = {s.name: next(ours if s.ours else peers) for s in series}
    rate = description["units_per_second"]
    figure, axes = pyplot.subplots(2, 2, figsize=(11.5, 8), layout="constrained")
    latency, memory, faster, floor = axes.flat
    for s in series:
        x, color = _times(s.lengths, rate), colors[s.name]
        _curve(latency, x, s.seconds, s.predicted, s.composed, color, s.name)
        if any(s.extra_bytes):
            values = [value and max(value, 1) / 2**20 for value in s.extra_bytes]
            _curve(memory, x, values, s.bytes_predicted, [False] * len(x), color, s.name)
        if baseline is not None and s is not baseline:
            ratio = speedup(s, baseline)
            theirs = dict(zip(baseline.lengths, baseline.predicted))
            why = [own or theirs.get(n) for n, own in zip(s.lengths, s.predicted)]
            _curve(faster, x, [ratio.get(n) for n in s.lengths], why, s.composed, color, s.name)
        share = over_floor(s)
        if share:
            lengths = sorted(share)
            values = [1 / share[n] for n in lengths]
            _curve(floor, _times(lengths, rate), values, [None] * len(lengths), [False] * len(lengths), color, s.name)
    latency.set(title="Latency", ylabel="seconds")
    memory.set(title="Peak memory above model and input", ylabel="MiB")
    faster.set(title=f"Speed-up over: {description['baseline']}", ylabel="times as fast")
    faster.axhline(1, color="#3d3d3d", linewidth=1)
    floor.set(title="Share of the floor", ylabel="floor / measured time")
    floor.axhline(1, color="#3d3d3d", linewidth=1)
    for axis in axes.flat:
        if any(len(line.get_xdata()) for line in axis.lines if line.get_marker() == "o"):
            _log_axes(axis, rate, description["unit"] if rate is None else "length of the audio")
        else:
            axis.set(xticks=[], yticks=[])
            axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes, color="#777777")
    for crossing in crossovers(results, case):
        if crossing.length and crossing.length > crossing.shortest:
            x = crossing.length / (rate or 1)
            for axis in (latency, faster):
                axis.axvline(x, color=colors[crossing.name], linestyle=":", linewidth=1.2)
    handles, labels = latency.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _times(lengths: Sequence[int], rate: float | None) -> list[float]:
    return [length / (rate or 1) for length in lengths]


def _curve(axis, x, y, predicted, composed, color, label) -> None:
    """Points of a curve; None in ``y`` are left out. Solid between measured points, dashed to predicted ones."""
    points = [(a, b, bool(why), part) for a, b, why, part in zip(x, y, predicted, composed) if b]
    if not points:
        return
    axis.plot([], [], color=color, marker="o", label=label)
    for (x0, y0, why0, _), (x1, y1, why1, _) in itertools.pairwise(points):
        axis.plot([x0, x1], [y0, y1], color=color, linewidth=1.8, linestyle="--" if why0 or why1 else "-")
    for a, b, why, part in points:
        style = "none" if why else "left" if part else "full"
        axis.plot(
            [a], [b], marker="o", markersize=5.5, color=color, fillstyle=style, markerfacecoloralt="white",
            linestyle="", zorder=3,
        )  # fmt: skip


def _log_axes(axis, rate: float | None, label: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set(xscale="log", yscale="log", xlabel=label)
    axis.grid(alpha=0.3)
    low, high = axis.get_xlim()
    if rate is None:
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    else:
        ticks = [second for second in _SECONDS if low <= second <= high]
        axis.set_xticks(ticks, [duration(second) for second in ticks])
    axis.xaxis.set_minor_formatter(NullFormatter())
    bottom, top = axis.get_ylim()
    if top / bottom < 1000:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
