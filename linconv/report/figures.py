"""Figures of a report, as PNG."""

import io
import textwrap

import numpy as np

from linconv.report.content import FAR

__all__ = ["curve_figure", "score_figure", "shift_figure", "trajectory_figure", "whose_shift"]


def whose_shift(shift: dict) -> str:
    """Names the teacher of a feature shift; the seed alone if all teachers are in one row."""
    return ("" if shift["mode"] == "teacher" else f"{shift['mode']}, ") + f"seed {shift['seed']}"


def _png(figure) -> bytes:
    from matplotlib import pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def score_figure(report: dict) -> bytes:
    """Plots each mode's score with its interval, and each seed's score as a dot."""
    plt = _pyplot()
    rows = report["rows"][::-1]
    figure, axis = plt.subplots(figsize=(9, 0.5 * len(rows) + 1.2), layout="constrained")
    for y, row in enumerate(rows):
        low, high = row["interval"]
        axis.plot([low, high], [y, y], color="tab:blue", linewidth=2)
        axis.plot(row["scores"], [y] * len(row["scores"]), "o", color="tab:grey", markersize=4)
        axis.plot(row["score"], y, "s", color="tab:blue")
    axis.set(
        yticks=range(len(rows)), yticklabels=[textwrap.fill(row["mode"], 64) for row in rows], xlabel=report["score"]
    )
    axis.grid(axis="x", alpha=0.3)
    return _png(figure)


def curve_figure(report: dict) -> bytes | None:
    """Plots MSE and cosine of each layer against step, for each mode's run with the lowest seed."""
    first = {}
    for curve in sorted(report["curves"], key=lambda curve: curve["seed"]):
        first.setdefault(curve["mode"], curve["seed"])
    curves = [curve for curve in report["curves"] if curve["seed"] == first[curve["mode"]]]
    if not curves:
        return None
    plt = _pyplot()
    figure, axes = plt.subplots(
        2, len(curves), figsize=(3.2 * len(curves), 5.2), layout="constrained", squeeze=False, sharex=True, sharey="row"
    )
    for column, curve in enumerate(curves):
        for row, name in enumerate(("layer_mse", "layer_cosine")):
            values, axis = np.asarray(curve[name]), axes[row, column]
            colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, values.shape[1]))
            for i in range(values.shape[1]):
                layer = curve["first_layer"] + i
                label = f"layer {layer}" if layer else "embeddings"
                axis.plot(curve["steps"], values[:, i], color=colors[i], label=label)
            axis.grid(alpha=0.3)
        axes[0, column].set_title(curve["mode"].replace(" (", "\n("), fontsize=9)
        axes[1, column].set_xlabel("step")
    axes[0, 0].set_ylabel("MSE to the teacher")
    axes[1, 0].set_ylabel("cosine to the teacher")
    axes[0, -1].legend(fontsize=7)
    return _png(figure)


def trajectory_figure(report: dict) -> bytes | None:
    """Plots students' paths and, dotted in the same colour, their teachers'. A ring marks the first step, a square the
    last; a teacher that does not move is a star."""
    paths = report["trajectories"]
    if not paths:
        return None
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(9, 6), layout="constrained")
    modes = list(dict.fromkeys(path["name"].removeprefix("teacher of ") for path in paths))
    for path in paths:
        x, y = np.asarray(path["points"]).T
        color = f"C{modes.index(path['name'].removeprefix('teacher of '))}"
        if path["side"] == "teacher" and np.ptp(x) + np.ptp(y) < 1e-6:
            axis.plot(x[0], y[0], "*", color=color, markersize=9)
            continue
        style = "-" if path["side"] == "student" else ":"
        axis.plot(x, y, style, color=color, marker=".", markersize=4, label=path["name"])
        axis.plot(x[0], y[0], "o", color=color, markerfacecolor="white")
        axis.plot(x[-1], y[-1], "s", color=color)
    shown = paths[0]["variance_shown"]
    axis.set(xlabel="first principal axis", ylabel="second principal axis", title=f"{shown:.0%} of the variance")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return _png(figure)


def shift_figure(report: dict) -> bytes | None:
    """Plots the cosine distance between pretrained and fine-tuned hidden states by layer."""
    if not report["feature_shift"]:
        return None
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    for shift in report["feature_shift"]:
        layers = range(1, len(shift["layers"]) + 1)
        axis.plot(layers, shift["layers"], marker="o", label=whose_shift(shift))
    axis.axhline(FAR, color="grey", linestyle=":")
    axis.set(xlabel="layer", ylabel="cosine distance", xticks=list(layers))
    axis.grid(alpha=0.3)
    axis.legend()
    return _png(figure)
