"""What runs of ``linconv finetune`` and ``linconv distill`` came to, side by side: JSON, Markdown and one HTML page."""

import base64
import html
import io
import json
import os
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from linconv.errors import UserError

__all__ = ["RunFolder", "build", "read_run", "table", "write"]

RESULTS_FILE, METRICS_FILE, PROBE_FILE = "results.json", "metrics.jsonl", "probe.safetensors"
# A rule of thumb, not a measured threshold: from this mean cosine distance on, the fine-tuned model is called far away.
FAR = 0.3
RESAMPLES, LEVEL = 10_000, 0.95


@dataclass(frozen=True)
class RunFolder:
    """One run as its folder tells it."""

    path: Path
    mode: str  # that of the recipe, spelled out; "teacher" for a fine-tuning
    seed: int
    teacher: str  # the folder of its teacher: itself, for one
    score: str  # such as test_accuracy
    value: float
    clips: np.ndarray  # (clips, 2): mistakes, and of how many
    parameters: int
    records: list[dict]  # the training's log
    recipe: dict
    provenance: dict  # of the training
    probe: dict[str, np.ndarray]  # "student/STEP", "teacher/STEP": (clips, layers, d); empty where there is none

    @property
    def lower_is_better(self) -> bool:
        return self.score.endswith(("_wer", "_cer"))


def read_run(folder: str | Path) -> RunFolder:
    """Reads a run's folder.

    Raises:
        UserError: it holds no finished run.
    """
    path = Path(folder)
    if not (path / RESULTS_FILE).is_file():
        raise UserError(f"RUN: no {RESULTS_FILE} in {path}; want the output folder of a finished finetune or distill")
    results = json.loads((path / RESULTS_FILE).read_text())
    scores = {k: v for k, v in results["scores"].items() if k.endswith(("_accuracy", "_wer"))}
    if not scores or not results.get("clips"):
        raise UserError(
            f"RUN: {path} was not scored clip by clip; want data with a test split, and this version's runs"
        )
    score, value = next(iter(scores.items()))
    recipe = results["recipe"]
    teacher = Path(recipe["model"]["teacher"])
    is_teacher = path.resolve() == teacher.resolve() or path.name == teacher.name
    log = path / METRICS_FILE
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return RunFolder(
        path=path,
        mode="teacher" if is_teacher else _mode_of(recipe["guide"]),
        seed=recipe["seed"],
        teacher=str(teacher),
        score=score,
        value=value,
        clips=np.asarray(results["clips"], dtype=float),
        parameters=results["parameters"],
        records=[record for record in records if "loss" in record],
        recipe=recipe,
        provenance=results.get("provenance", {}),
        probe=_read_probe(path / PROBE_FILE),
    )


def _read_probe(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        return {}
    from safetensors.torch import load_file

    return {name: value.float().numpy() for name, value in load_file(file).items()}


def _mode_of(guide: dict) -> str:
    given = {k: v for k, v in guide.items() if v is not None and k not in ("name", "checkpoints", "mode")}
    name = guide["name"].replace("_", "-")
    if guide["name"] == "hybrid":
        name += f" of {(guide['mode'] or 'target_guided').replace('_', '-')}"
    return name + (f" ({', '.join(f'{k} {v}' for k, v in given.items())})" if given else "")


# ---- What they come to


def build(folders: list[str | Path], title: str = "Distillation runs") -> dict:
    """The report's content: runs, a row for each mode, and what the teachers' features advise.

    Intervals are paired bootstraps: seeds and clips are drawn with replacement, RESAMPLES times, the same ones for a
    student and for its teacher; the same clips for all seeds, whose errors on one clip are not independent.
    """
    runs = [read_run(folder) for folder in folders]
    if len({run.score for run in runs}) > 1:
        raise UserError(f"RUN: scores of different kinds, {', '.join(sorted({run.score for run in runs}))}")
    teachers = {(run.teacher, run.seed): run for run in runs if run.mode == "teacher"}
    groups: dict[str, list[RunFolder]] = defaultdict(list)
    for run in runs:
        groups[run.mode].append(run)
    rows = [_row(mode, group, teachers) for mode, group in groups.items()]
    rows.sort(
        key=lambda row: (row["mode"] != "teacher", -row["score"] if not runs[0].lower_is_better else row["score"])
    )
    return {
        "title": title,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "score": runs[0].score,
        "lower_is_better": runs[0].lower_is_better,
        "level": LEVEL,
        "rows": rows,
        "curves": [_curve(run) for run in runs if any("layer_mse" in record for record in run.records)],
        "trajectories": _trajectories(runs),
        "feature_shift": [_feature_shift(run) for run in runs if run.mode == "teacher" and run.probe],
        "runs": [
            {"path": path, "mode": r.mode, "seed": r.seed, "score": r.value, "parameters": r.parameters}
            for path, r in zip(_short([run.path for run in runs]), runs)
        ],
        "recipe": _training_of(runs),
        "provenance": _common([run.provenance for run in runs]),
        "model_card": _model_card(rows, runs),
    }


def _short(paths: list[Path]) -> list[str]:
    """Each path from the last folder that all have in common."""
    whole = [path.resolve() for path in paths]
    root = Path(os.path.commonpath(whole)) if len(whole) > 1 else whole[0].parent
    return [str(path.relative_to(root)) for path in whole]


def _training_of(runs: list[RunFolder]) -> dict:
    """What all recipes say of the data, the conversion and the training; where they differ, what each of them says."""
    blocks = [{k: run.recipe.get(k, {}) for k in ("conversion", "finetune", "distill")} for run in runs]
    for block, run in zip(blocks, runs):
        block["data"] = {k: v for k, v in run.recipe["data"].items() if k != "path"}
    return {name: _common([block[name] for block in blocks]) for name in blocks[0]}


def _common(found: list[dict]) -> dict:
    """One dictionary of several: a value that all share as it is, others as a list of those that occur."""
    merged = {}
    for key in dict.fromkeys(key for entry in found for key in entry):
        values = []
        for entry in found:
            if entry.get(key) not in values:
                values.append(entry.get(key))
        if key == "date":  # of many, the first and the last
            values = sorted({min(values), max(values)})
        merged[key] = values[0] if len(values) == 1 else values
    return merged


def _score(clips: np.ndarray, lower: bool) -> np.ndarray:
    """Of (..., clips, 2): the error rate, or the share that is right."""
    rate = clips[..., 0].sum(-1) / np.maximum(clips[..., 1].sum(-1), 1)
    return rate if lower else 1 - rate


def _row(mode: str, runs: list[RunFolder], teachers: dict) -> dict:
    lower = runs[0].lower_is_better
    scores, differences, retained = [], [], []  # each run's, (RESAMPLES,)
    paired = mode != "teacher" and all((run.teacher, run.seed) in teachers for run in runs)
    for run in runs:
        chosen = np.random.default_rng(0).integers(0, len(run.clips), (RESAMPLES, len(run.clips)))
        mine = _score(run.clips[chosen], lower)
        scores.append(mine)
        if paired:
            other = teachers[run.teacher, run.seed]
            if len(other.clips) != len(run.clips):
                raise UserError(f"RUN: {run.path} and {other.path} were scored on different clips")
            theirs = _score(other.clips[chosen], lower)
            differences.append(mine - theirs)
            retained.append(_retained(mine, theirs, lower))
    row = {
        "mode": mode,
        "seeds": sorted(run.seed for run in runs),
        "score": float(np.mean([run.value for run in runs])),
        "scores": [run.value for run in runs],
        "interval": _interval(scores),
        "parameters": runs[0].parameters,
    }
    if paired:
        pairs = [(run.value, teachers[run.teacher, run.seed].value) for run in runs]
        row["difference"] = float(np.mean([a - b for a, b in pairs]))
        row["difference_interval"] = _interval(differences)
        row["retained"] = float(np.mean([_retained(np.float64(a), np.float64(b), lower) for a, b in pairs]))
        row["retained_interval"] = _interval(retained)
    return row


def _retained(mine, theirs, lower: bool):
    """The student's share of what the teacher gets right, words or clips."""
    mine, theirs = (1 - mine, 1 - theirs) if lower else (mine, theirs)
    return mine / np.maximum(theirs, 1e-9)


def _interval(draws: list[np.ndarray]) -> list[float]:
    """Of the mean over seeds, from each seed's draws of clips: (RESAMPLES,) each."""
    seeds = np.random.default_rng(1).integers(0, len(draws), (len(draws), RESAMPLES))
    means = np.take_along_axis(np.stack(draws), seeds, axis=0).mean(0)
    tail = (1 - LEVEL) / 2
    return [float(q) for q in np.quantile(means, [tail, 1 - tail])]


def _curve(run: RunFolder) -> dict:
    records = [record for record in run.records if "layer_mse" in record]
    return {
        "mode": run.mode,
        "seed": run.seed,
        "steps": [record["step"] for record in records],
        "layer_mse": [record["layer_mse"] for record in records],  # (records, layers)
        "layer_cosine": [record["layer_cosine"] for record in records],
    }


def _steps(probe: dict[str, np.ndarray], side: str) -> list[tuple[int, np.ndarray]]:
    found = [(int(name.partition("/")[2]), value) for name, value in probe.items() if name.startswith(f"{side}/")]
    return sorted(found, key=lambda pair: pair[0])


def _trajectories(runs: list[RunFolder]) -> list[dict]:
    """Paths of the probe's mean hidden state, all layers side by side, on the two principal axes of them all.

    Of the first seed's runs; a teacher that does not move is a point.
    """
    first = min((run.seed for run in runs if run.probe), default=None)
    paths = []
    for run in runs:
        for side in ("student", "teacher"):
            steps = _steps(run.probe, side) if run.seed == first else []
            if steps:
                points = np.stack([value.mean(0).ravel() for _, value in steps])  # (steps, layers * d)
                name = run.mode if side == "student" else f"teacher of {run.mode}"
                paths.append({"name": name, "side": side, "steps": [step for step, _ in steps], "points": points})
    paths = [path for path in paths if path["points"].shape[1] == paths[0]["points"].shape[1]]
    if not paths:
        return []
    everything = np.concatenate([path["points"] for path in paths])
    center = everything.mean(0)
    _, values, axes = np.linalg.svd(everything - center, full_matrices=False)
    shares = values**2 / max((values**2).sum(), 1e-30)
    return [
        {
            **{key: path[key] for key in ("name", "side", "steps")},
            "points": ((path["points"] - center) @ axes[:2].T).tolist(),
            "variance_shown": float(shares[:2].sum()),
        }
        for path in paths
    ]


def _feature_shift(run: RunFolder) -> dict:
    """How far fine-tuning moved each layer: the mean over clips of 1 - cosine of first and last hidden state."""
    steps = _steps(run.probe, "student")
    first, last = steps[0][1], steps[-1][1]  # (clips, layers, d)
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(last, axis=-1)
    distance = (1 - (first * last).sum(-1) / np.maximum(norms, 1e-9)).mean(0)
    mean = float(distance.mean())
    far = mean >= FAR
    return {
        "seed": run.seed,
        "layers": distance.tolist(),
        "mean": mean,
        "advice": f"mean cosine distance {mean:.2f}, {'at least' if far else 'below'} {FAR}: fine-tuning "
        + (
            "moved the features far; try trajectory or waypoint guidance"
            if far
            else "kept the features; try the target"
        )
        + " first (a rule of thumb)",
    }


def _model_card(rows: list[dict], runs: list[RunFolder]) -> dict:
    """Metadata in the form of the hub's model cards, for each students' mode."""
    task = {
        "classification": "audio-classification",
        "ctc": "automatic-speech-recognition",
        "text_classification": "text-classification",
    }[runs[0].recipe["task"]]
    metric = runs[0].score.rpartition("_")[2]
    data = runs[0].recipe["data"]["path"] or ""
    return {
        "library_name": "linconv",
        "pipeline_tag": task,
        "tags": ["linconv", runs[0].recipe["conversion"]["mixer"]],
        "model-index": [
            {
                "name": row["mode"],
                "results": [
                    {
                        "task": {"type": task},
                        "dataset": {"name": Path(data).name, "type": Path(data).name},
                        "metrics": [{"type": metric, "value": row["score"]}],
                    }
                ],
            }
            for row in rows
        ],
    }


# ---- How it is written


def write(report: dict, folder: str | Path) -> Path:
    """Writes report.json, report.md and report.html; returns the last one's path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text(_markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(_page(report), encoding="utf-8")
    return folder / "report.html"


def table(report: dict) -> tuple[list[str], list[list[str]]]:
    header = ["mode", "seeds", f"{report['score']} [{report['level']:.0%}]", "to its teacher", "retained", "parameters"]
    cells = []
    for row in report["rows"]:
        low, high = row["interval"]
        line = [row["mode"], str(len(row["seeds"])), f"{row['score']:.1%} [{low:.1%}, {high:.1%}]"]
        if "difference" in row:
            (low, high), (least, most) = row["difference_interval"], row["retained_interval"]
            line.append(f"{100 * row['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] points")
            line.append(f"{row['retained']:.1%} [{least:.1%}, {most:.1%}]")
        else:
            line += ["", ""]
        cells.append([*line, f"{row['parameters']:,}"])
    return header, cells


NOTE = (
    "Means over seeds. Intervals: paired bootstrap over seeds and over the clips or sentences of the split "
    "({resamples:,} draws), student and teacher on the same draws."
)


def _note() -> str:
    return NOTE.format(resamples=RESAMPLES)


def _last_values(report: dict) -> list[str]:
    lines = []
    for curve in report["curves"]:
        mse, cosine = np.mean(curve["layer_mse"][-1]), np.mean(curve["layer_cosine"][-1])
        lines.append(f"{curve['mode']}, seed {curve['seed']}: MSE {mse:.3g}, cosine {cosine:.3f}, mean over layers")
    return lines


def _provenance(report: dict) -> str:
    def shown(value) -> str:
        return " and ".join(map(str, value)) if isinstance(value, list) else str(value)

    return ", ".join(f"{k} {shown(v)}" for k, v in report["provenance"].items() if v is not None)


def _markdown(report: dict) -> str:
    header, rows = table(report)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    parts = [f"# {report['title']}", text, _note()]
    if report["curves"]:
        parts += ["## Hidden states at the last record", "\n".join(f"- {line}" for line in _last_values(report))]
    if report["feature_shift"]:
        shifts = [f"- seed {shift['seed']}: {shift['advice']}" for shift in report["feature_shift"]]
        parts += ["## Feature shift of the fine-tuning", "\n".join(shifts)]
    parts += ["## Provenance", _provenance(report) + f"; written {report['made']}"]
    return "\n\n".join(parts) + "\n"


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; } img { max-width: 100%; } .small { color: #555; font-size: .85rem; }
"""


def _page(report: dict) -> str:
    header, rows = table(report)

    def cells(line, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>"

    body = [f"<h1>{html.escape(report['title'])}</h1>"]
    body.append("<table>" + cells(header, "th") + "".join(cells(row, "td") for row in rows) + "</table>")
    body.append(f'<p class="small">{html.escape(_note())}</p>')
    figures = (
        ("Scores", _score_figure(report)),
        ("Hidden states against step", _curve_figure(report)),
        ("Trajectories of the hidden states", _trajectory_figure(report)),
        ("Feature shift of the fine-tuning", _shift_figure(report)),
    )
    for title, figure in figures:
        if figure is not None:
            image = base64.b64encode(figure).decode()
            body.append(f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{image}">')
    body += [f"<p>Seed {shift['seed']}: {html.escape(shift['advice'])}</p>" for shift in report["feature_shift"]]
    card = html.escape(json.dumps(report["model_card"], indent=1))
    body.append(f"<h2>Model card metadata</h2><details><summary>JSON</summary><pre>{card}</pre></details>")
    body.append(f'<p class="small">{html.escape(_provenance(report))}; written {report["made"]}</p>')
    head = f'<meta charset="utf-8"><title>{html.escape(report["title"])}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


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


def _score_figure(report: dict) -> bytes:
    """Each mode's score, its interval, and its seeds' as dots."""
    plt = _pyplot()
    rows = report["rows"][::-1]
    figure, axis = plt.subplots(figsize=(9, 0.5 * len(rows) + 1.2), layout="constrained")
    for y, row in enumerate(rows):
        low, high = row["interval"]
        axis.plot([low, high], [y, y], color="tab:blue", linewidth=2)
        axis.plot(row["scores"], [y] * len(row["scores"]), "o", color="tab:grey", markersize=4)
        axis.plot(row["score"], y, "s", color="tab:blue")
    axis.set(yticks=range(len(rows)), yticklabels=[row["mode"] for row in rows], xlabel=report["score"])
    axis.grid(axis="x", alpha=0.3)
    return _png(figure)


def _curve_figure(report: dict) -> bytes | None:
    """Per-layer MSE and cosine against step, a row of panels for each run of the first seed."""
    first = min((curve["seed"] for curve in report["curves"]), default=None)
    curves = [curve for curve in report["curves"] if curve["seed"] == first]
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
            for layer in range(values.shape[1]):
                axis.plot(curve["steps"], values[:, layer], color=colors[layer], label=f"layer {layer + 1}")
            axis.grid(alpha=0.3)
        axes[0, column].set_title(curve["mode"].replace(" (", "\n("), fontsize=9)
        axes[1, column].set_xlabel("step")
    axes[0, 0].set_ylabel("MSE to the teacher")
    axes[1, 0].set_ylabel("cosine to the teacher")
    axes[0, -1].legend(fontsize=7)
    return _png(figure)


def _trajectory_figure(report: dict) -> bytes | None:
    """Students' paths, and in the same colour their teachers', dotted, from a ring at the first step to a square at the
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


def _shift_figure(report: dict) -> bytes | None:
    """Cosine distance of the pretrained to the fine-tuned hidden states, layer by layer."""
    if not report["feature_shift"]:
        return None
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    for shift in report["feature_shift"]:
        layers = range(1, len(shift["layers"]) + 1)
        axis.plot(layers, shift["layers"], marker="o", label=f"seed {shift['seed']}")
    axis.axhline(FAR, color="grey", linestyle=":")
    axis.set(xlabel="layer", ylabel="cosine distance", xticks=list(layers))
    axis.grid(alpha=0.3)
    axis.legend()
    return _png(figure)
