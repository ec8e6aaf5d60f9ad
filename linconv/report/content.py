"""The content of a report: a row for each mode, curves, trajectories, and advice from the teachers' features."""

import os
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from linconv.errors import UserError
from linconv.report.grouping import check_apart, check_clips, named, teacher_of
from linconv.report.runs import RunFolder, read_run
from linconv.report.statistics import LEVEL, interval_of, resampled, retained_of

__all__ = ["FAR", "build"]

# A rule of thumb, not a measured threshold: the mean cosine distance from which a fine-tuned model counts as far away.
FAR = 0.3


def build(folders: list[str | Path], title: str = "Distillation runs") -> dict:
    """Builds the report's content: runs, a row for each mode, and advice from the teachers' features.

    Runs share a row if, apart from the seed, their recipes agree in everything that affects the model.

    Intervals are paired bootstraps: seeds and clips are drawn with replacement, RESAMPLES times. A student and its
    teacher share draws. All seeds share draws of clips, since their errors on one clip are not independent.
    """
    runs = [read_run(folder) for folder in folders]
    places = [run.path.resolve() for run in runs]
    for place, run in zip(places, runs):
        if places.count(place) > 1:
            raise UserError(f"RUN: got {run.path} {places.count(place)} times; want each run once")
    if len({run.score for run in runs}) > 1:
        raise UserError(f"RUN: scores of different kinds, {', '.join(sorted({run.score for run in runs}))}")
    order = [run.path for run in runs]
    fine_tuned = named([run for run in runs if run.is_teacher], {})
    students = [run for run in runs if not run.is_teacher]
    teachers = {run.path: teacher_of(run, fine_tuned) for run in students}
    runs = sorted([*fine_tuned, *named(students, teachers)], key=lambda run: order.index(run.path))
    groups: dict[tuple, list[RunFolder]] = defaultdict(list)
    for run in runs:
        groups[not run.is_teacher, run.mode].append(run)
    rows = []
    for is_student in (False, True):  # teachers first, the best of each first
        found = [_row(group, teachers) for (kind, _), group in groups.items() if kind == is_student]
        rows += sorted(found, key=lambda row: row["score"], reverse=not runs[0].measure.lower_is_better)
    return {
        "title": title,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "score": runs[0].score,
        "lower_is_better": runs[0].measure.lower_is_better,
        "level": LEVEL,
        "rows": rows,
        "curves": [_curve(run) for run in runs if any("layer_mse" in record for record in run.records)],
        "trajectories": _trajectories(runs),
        "feature_shift": [_feature_shift(run) for run in runs if run.is_teacher and run.probe],
        "runs": [
            {"path": path, "mode": r.mode, "seed": r.seed, "score": r.value, "parameters": r.parameters}
            for path, r in zip(_short([run.path for run in runs]), runs)
        ],
        "recipe": _training_of(runs),
        "provenance": _common([run.provenance for run in runs]),
        "model_card": _model_card(rows, runs),
    }


def _short(paths: list[Path]) -> list[str]:
    """Returns each path relative to the last folder that all have in common."""
    whole = [path.resolve() for path in paths]
    root = Path(os.path.commonpath(whole)) if len(whole) > 1 else whole[0].parent
    return [str(path.relative_to(root)) for path in whole]


def _training_of(runs: list[RunFolder]) -> dict:
    """Merges the recipes' data, conversion and training; where recipes differ, it lists all values."""
    blocks = [{k: run.recipe.get(k, {}) for k in ("conversion", "finetune", "distill")} for run in runs]
    for block, run in zip(blocks, runs):
        block["data"] = {k: v for k, v in run.recipe["data"].items() if k != "path"}
    return {name: _common([block[name] for block in blocks]) for name in blocks[0]}


def _common(found: list[dict]) -> dict:
    """Merges dictionaries: a value that all share stays as it is; others become a list of the distinct values."""
    merged = {}
    for key in dict.fromkeys(key for entry in found for key in entry):
        values = []
        for entry in found:
            if entry.get(key) not in values:
                values.append(entry.get(key))
        if key == "date":  # of several, the first and the last
            values = sorted({min(values), max(values)})
        merged[key] = values[0] if len(values) == 1 else values
    return merged


def _row(runs: list[RunFolder], teachers: dict[Path, RunFolder | None]) -> dict:
    check_apart(runs, teachers)
    measure = runs[0].measure
    scores, differences, retained = [], [], []  # each run's, (RESAMPLES,)
    paired = all(teachers.get(run.path) is not None for run in runs)
    for run in runs:
        mine = resampled(run)
        scores.append(mine)
        if paired:
            other = teachers[run.path]
            check_clips(run, other)
            theirs = resampled(other)
            differences.append(mine - theirs)
            retained.append(retained_of(mine, theirs, measure))
    row = {
        "mode": runs[0].mode,
        "seeds": sorted(run.seed for run in runs),
        "score": float(np.mean([run.value for run in runs])),
        "scores": [run.value for run in runs],
        "interval": interval_of(scores),
        "parameters": runs[0].parameters,
    }
    if paired:
        pairs = [(run.value, teachers[run.path].value) for run in runs]
        row["difference"] = float(np.mean([a - b for a, b in pairs]))
        row["difference_interval"] = interval_of(differences)
        share = float(np.mean([retained_of(np.float64(a), np.float64(b), measure) for a, b in pairs]))
        row["retained"] = None if np.isnan(share) else share
        row["retained_interval"] = interval_of(retained)
    return row


def _curve(run: RunFolder) -> dict:
    records = [record for record in run.records if "layer_mse" in record]
    return {
        "mode": run.mode,
        "seed": run.seed,
        "first_layer": 0 if run.recipe.get("distill", {}).get("include_embeddings") else 1,  # 0 is the embeddings
        "steps": [record["step"] for record in records],
        "layer_mse": [record["layer_mse"] for record in records],  # (records, layers)
        "layer_cosine": [record["layer_cosine"] for record in records],
    }


def _steps(probe: dict[str, np.ndarray], side: str) -> list[tuple[int, np.ndarray]]:
    found = [(int(name.partition("/")[2]), value) for name, value in probe.items() if name.startswith(f"{side}/")]
    return sorted(found, key=lambda pair: pair[0])


def _trajectories(runs: list[RunFolder]) -> list[dict]:
    """Projects paths of the probe's mean hidden state, all layers concatenated, on the first two principal axes of all.

    Each mode is shown by its run with the lowest seed. A teacher that does not move is a point.
    """
    first = {}
    for run in sorted((run for run in runs if run.probe), key=lambda run: run.seed):
        first.setdefault((run.is_teacher, run.mode), run.path)
    paths = []
    for run in (run for run in runs if run.path in first.values()):
        for side in ("student", "teacher"):
            steps = _steps(run.probe, side)
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
    """Measures how far fine-tuning moved each layer: mean over clips of 1 - cosine of first and last hidden state."""
    steps = _steps(run.probe, "student")
    first, last = steps[0][1], steps[-1][1]  # (clips, layers, d)
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(last, axis=-1)
    distance = (1 - (first * last).sum(-1) / np.maximum(norms, 1e-9)).mean(0)
    mean = float(distance.mean())
    far = mean >= FAR
    return {
        "mode": run.mode,
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
    """Makes metadata in the form of the hub's model cards, with a result for each row."""
    task = {
        "classification": "audio-classification",
        "ctc": "automatic-speech-recognition",
        "text_classification": "text-classification",
        "language_modeling": "text-generation",
    }[runs[0].recipe["task"]]
    metric = runs[0].score.rpartition("_")[2]
    data = runs[0].recipe["data"]["path"] or ""
    students = [run for run in runs if not run.is_teacher]
    return {
        "library_name": "linconv",
        "pipeline_tag": task,
        "tags": ["linconv", *dict.fromkeys(run.recipe["conversion"]["mixer"] for run in students or runs)],
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
