"""What runs of ``linconv finetune`` and ``linconv distill`` came to, side by side: JSON, Markdown and one HTML page."""

import base64
import html
import io
import json
import os
import textwrap
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from linconv.errors import UserError
from linconv.recipe import Recipe

__all__ = ["RunFolder", "build", "read_run", "table", "write"]

RESULTS_FILE, METRICS_FILE, PROBE_FILE = "results.json", "metrics.jsonl", "probe.safetensors"
CONFIG_FILE = "config.json"
# A rule of thumb, not a measured threshold: from this mean cosine distance on, the fine-tuned model is called far away.
FAR = 0.3
RESAMPLES, LEVEL = 10_000, 0.95
DRAWN_AT_ONCE = 1 << 20  # clips, which bounds what the resamples take of memory
# Training arguments that leave the model as it is, by how their names begin: what is written, and where to.
_WRITING = ("log_", "logging_", "report_to", "run_name", "project", "trackio_", "disable_tqdm", "push_to_hub", "hub_")
_WRITING += ("resume_from_checkpoint",)
# These too, unless the best checkpoint is kept in the end: then they say which there are to choose from.
_CHOOSING = ("save_", "eval_", "per_device_eval_")
_BLOCKS = ("guide", "conversion", "distill", "finetune", "model", "data", "task")  # the order in which they are said


@dataclass(frozen=True)
class Measure:
    """A kind of score. What it is taken of is the rate: mistakes a clip or word, or nats a token."""

    of_rate: Callable[[np.ndarray], np.ndarray]
    share_right: Callable[[np.ndarray], np.ndarray]  # of the score: so much is right, of which a student retains some
    lower_is_better: bool
    percent: bool = True  # how it is written


MEASURES = {
    "accuracy": Measure(lambda rate: 1 - rate, lambda score: score, lower_is_better=False),
    "wer": Measure(lambda rate: rate, lambda score: 1 - score, lower_is_better=True),
    # Its inverse is the geometric mean of the probabilities that were given to the right tokens.
    "perplexity": Measure(np.exp, lambda score: 1 / score, lower_is_better=True, percent=False),
}


@dataclass(frozen=True)
class RunFolder:
    """One run as its folder tells it."""

    path: Path
    is_teacher: bool  # a fine-tuning
    mode: str  # that of the recipe, spelled out; "teacher" for a fine-tuning; in a report, what tells its row apart
    seed: int
    teacher: str  # the folder of its teacher, as its recipe has it: its own, for one
    score: str  # such as test_accuracy
    value: float
    clips: np.ndarray  # (clips, 2): mistakes, and of how many; or nats, and of how many tokens
    parameters: int
    records: list[dict]  # the training's log
    recipe: dict
    provenance: dict  # of the training
    probe: dict[str, np.ndarray]  # "student/STEP", "teacher/STEP": (clips, layers, d); empty where there is none

    @property
    def measure(self) -> Measure:
        return _measure(self.score)


def _measure(score: str) -> Measure:
    return MEASURES[score.rpartition("_")[2]]


def read_run(folder: str | Path) -> RunFolder:
    """Reads a run's folder.

    Raises:
        UserError: it holds no finished run.
    """
    path = Path(folder)
    if not (path / RESULTS_FILE).is_file():
        raise UserError(f"RUN: no {RESULTS_FILE} in {path}; want the output folder of a finished finetune or distill")
    results = json.loads((path / RESULTS_FILE).read_text())
    scores = {k: v for k, v in results["scores"].items() if k.rpartition("_")[2] in MEASURES}
    if not scores or not results.get("clips"):
        raise UserError(
            f"RUN: {path} was not scored clip by clip; want data with a test split, and this version's runs"
        )
    score, value = next(iter(scores.items()))
    recipe = results["recipe"]
    log = path / METRICS_FILE
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    records = [record for record in records if "loss" in record]
    probe = _read_probe(path / PROBE_FILE)
    is_teacher = _is_teacher(path, results, records, probe)
    return RunFolder(
        path=path,
        is_teacher=is_teacher,
        mode="teacher" if is_teacher else _mode_of(recipe["guide"]),
        seed=recipe["seed"],
        teacher=recipe["model"]["teacher"],
        score=score,
        value=value,
        clips=np.asarray(results["clips"], dtype=float),
        parameters=results["parameters"],
        records=records,
        recipe=recipe,
        provenance=results.get("provenance", {}),
        probe=probe,
    )


def _is_teacher(path: Path, results: dict, records: list[dict], probe: dict[str, np.ndarray]) -> bool:
    """Whether a run was a fine-tuning: the folder's name does not tell, for folders are moved and names recur."""
    if "command" in results:
        return results["command"] == "finetune"
    # Results of earlier versions do not say it; but only a student is measured against a teacher as it trains.
    if records or probe:
        measured = any("layer_mse" in record for record in records)
        return not measured and not any(name.startswith("teacher/") for name in probe)
    if (path / CONFIG_FILE).is_file():
        config = json.loads((path / CONFIG_FILE).read_text())
        return not config.get("linconv", {}).get("layers")  # Whisper's teachers are converted in no layer
    return path.resolve() == Path(results["recipe"]["model"]["teacher"]).resolve()


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


# ---- Which of them belong together


def _teacher_of(student: RunFolder, teachers: list[RunFolder]) -> RunFolder | None:
    """The teacher in the folder that the student's recipe names, or that was there when it was trained.

    Where several were there one after another, and were moved, it is that of the student's seed.
    """
    folder = Path(student.teacher).resolve()
    found = [run for run in teachers if folder in (run.path.resolve(), Path(run.teacher).resolve())]
    if len(found) > 1:
        found = [run for run in found if run.seed == student.seed]
    return found[0] if len(found) == 1 else None


def _named(runs: list[RunFolder], teachers: dict[Path, RunFolder | None]) -> list[RunFolder]:
    """Students, or teachers, with modes that say in what their recipes differ, if in anything but the seed.

    ``teachers`` has those of the students, by the students' paths.
    """
    found = [_settings(run) for run in runs]
    keys = sorted({key: None for settings in found for key in settings}, key=lambda key: _BLOCKS.index(_block(key)))
    for settings in found:
        settings.update({key: _default(key, settings) for key in keys if key not in settings})
    differing = [key for key in keys if any(settings[key] != found[0][key] for settings in found)]
    words = [_in_words(settings, differing) for settings in found]
    # Whose student it is goes without saying where something else has told that already.
    whose = [[*said, *_of_teacher(teachers.get(run.path))] for said, run in zip(words, runs)]
    if len(set(map(tuple, whose))) > len(set(map(tuple, words))):
        words = whose
    texts = [", ".join(said) for said in words]
    return [
        replace(run, mode=(f"teacher ({text})" if run.is_teacher else text) if text else run.mode)
        for run, text in zip(runs, texts)
    ]


def _settings(run: RunFolder) -> dict[str, Any]:
    """What of its recipe made the model what it is, but for the seed: dotted keys and values."""
    recipe = _flat(run.recipe)
    training, others = ("finetune", ()) if run.is_teacher else ("distill", ("conversion",))
    best = recipe.get(f"{training}.load_best_model_at_end")
    left_out = tuple(f"{training}.{name}" for name in (_WRITING if best else _WRITING + _CHOOSING))
    left_out += ("model.teacher", "model.waypoints", "data.path")
    kept = {} if run.is_teacher else {"guide": run.mode}
    for key, value in recipe.items():
        if _block(key) in (training, *others, "model", "data", "task") and not key.startswith(left_out):
            # Of a cache it is not the place that matters, but that what it holds is rounded.
            kept[key] = "given" if key == "distill.teacher_cache" and value is not None else value
    return kept


def _block(key: str) -> str:
    return key.partition(".")[0]


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _default(key: str, settings: dict[str, Any]) -> Any:
    """What it comes to if a recipe does not have the key; None where that is nothing."""
    name = key.partition(".")[2]
    if _block(key) in ("finetune", "distill"):
        from linconv.distillation import DistillationArguments

        return None if name.startswith(_CHOOSING) else getattr(DistillationArguments, name, None)
    if key.startswith("conversion.options."):
        from linconv import mixers

        mixer = settings["conversion.mixer"]
        options = mixers.get(mixer).options() if mixer in mixers.names() else {}
        return options.get(name.removeprefix("options."))
    return _flat(asdict(Recipe())).get(key)


def _in_words(settings: dict[str, Any], keys: list[str]) -> list[str]:
    """What the settings are; defaults only where there is nothing else to be said."""
    always = ("guide", "conversion.mixer")
    said = [key for key in keys if key in always or settings[key] != _default(key, settings)]
    said = said or [key for key in keys if settings[key] is not None or key == "conversion.layers"]
    return [_setting_in_words(key, settings[key]) for key in said]


def _setting_in_words(key: str, value: Any) -> str:
    if key in ("guide", "conversion.mixer"):
        return value
    if key == "conversion.layers":
        return "all layers" if value is None else f"layers {','.join(map(str, value))}" if value else "no layers"
    value = str(value).removesuffix(".0") if isinstance(value, float) else value
    if key.startswith("conversion.options."):
        return f"{key.removeprefix('conversion.options.')}={value}"
    for block in ("distill.", "finetune.", "model.config.", "model.overrides."):
        key = key.removeprefix(block)
    return f"{key} {value}"


def _of_teacher(teacher: RunFolder | None) -> list[str]:
    # If all teachers are of one row, they are plainly "teacher", and one that is not in the report may be of it too.
    return [] if teacher is None or teacher.mode == "teacher" else [f"of {teacher.mode}"]


def _check_apart(runs: list[RunFolder], teachers: dict[Path, RunFolder | None]) -> None:
    """Raises a UserError where two runs of a row are not two draws of the same thing."""
    first = runs[0]
    seen: dict[tuple, RunFolder] = {}
    for run in runs:
        _check_clips(first, run)
        teacher = teachers.get(run.path)
        # Students of one seed are two draws where their teachers are.
        other = seen.setdefault((run.seed, None if teacher is None else teacher.path), run)
        if other is not run:
            raise UserError(
                f"RUN: {other.path} and {run.path} are both {run.mode} with seed {run.seed}; want one run of each seed"
            )


def _check_clips(run: RunFolder, other: RunFolder) -> None:
    # Of how many words each clip is tells clips apart where their number does not.
    if not np.array_equal(run.clips[:, 1], other.clips[:, 1]):
        raise UserError(
            f"RUN: {run.path} and {other.path} were scored on different clips, {len(run.clips)} and "
            f"{len(other.clips)}; want the same test split for both"
        )


# ---- What they come to


def build(folders: list[str | Path], title: str = "Distillation runs") -> dict:
    """The report's content: runs, a row for each mode, and what the teachers' features advise.

    Runs are one row if their recipes agree in all that makes a model what it is, but for the seed.

    Intervals are paired bootstraps: seeds and clips are drawn with replacement, RESAMPLES times, the same ones for a
    student and for its teacher; the same clips for all seeds, whose errors on one clip are not independent.
    """
    runs = [read_run(folder) for folder in folders]
    places = [run.path.resolve() for run in runs]
    for place, run in zip(places, runs):
        if places.count(place) > 1:
            raise UserError(f"RUN: got {run.path} {places.count(place)} times; want each run once")
    if len({run.score for run in runs}) > 1:
        raise UserError(f"RUN: scores of different kinds, {', '.join(sorted({run.score for run in runs}))}")
    order = [run.path for run in runs]
    fine_tuned = _named([run for run in runs if run.is_teacher], {})
    students = [run for run in runs if not run.is_teacher]
    teachers = {run.path: _teacher_of(run, fine_tuned) for run in students}
    runs = sorted([*fine_tuned, *_named(students, teachers)], key=lambda run: order.index(run.path))
    groups: dict[tuple, list[RunFolder]] = defaultdict(list)
    for run in runs:
        groups[not run.is_teacher, run.mode].append(run)
    rows = []
    for is_student in (False, True):  # teachers first, and the best of each
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


def _score(clips: np.ndarray, measure: Measure) -> np.ndarray:
    """Of (..., clips, 2), over all clips."""
    return measure.of_rate(clips[..., 0].sum(-1) / np.maximum(clips[..., 1].sum(-1), 1))


def _resampled(run: RunFolder) -> np.ndarray:
    """A run's score on each draw of its clips, (RESAMPLES,): the same draws for all runs of as many clips."""
    count, generator = len(run.clips), np.random.default_rng(0)
    most = max(1, DRAWN_AT_ONCE // count)
    draws = (min(most, RESAMPLES - start) for start in range(0, RESAMPLES, most))
    pieces = [_score(run.clips[generator.integers(0, count, (some, count))], run.measure) for some in draws]
    return np.concatenate(pieces)


def _row(runs: list[RunFolder], teachers: dict[Path, RunFolder | None]) -> dict:
    _check_apart(runs, teachers)
    measure = runs[0].measure
    scores, differences, retained = [], [], []  # each run's, (RESAMPLES,)
    paired = all(teachers.get(run.path) is not None for run in runs)
    for run in runs:
        mine = _resampled(run)
        scores.append(mine)
        if paired:
            other = teachers[run.path]
            _check_clips(run, other)
            theirs = _resampled(other)
            differences.append(mine - theirs)
            retained.append(_retained(mine, theirs, measure))
    row = {
        "mode": runs[0].mode,
        "seeds": sorted(run.seed for run in runs),
        "score": float(np.mean([run.value for run in runs])),
        "scores": [run.value for run in runs],
        "interval": _interval(scores),
        "parameters": runs[0].parameters,
    }
    if paired:
        pairs = [(run.value, teachers[run.path].value) for run in runs]
        row["difference"] = float(np.mean([a - b for a, b in pairs]))
        row["difference_interval"] = _interval(differences)
        row["retained"] = float(np.mean([_retained(np.float64(a), np.float64(b), measure) for a, b in pairs]))
        row["retained_interval"] = _interval(retained)
    return row


def _retained(mine, theirs, measure: Measure):
    """The student's share of what the teacher gets right, of two scores."""
    return measure.share_right(mine) / np.maximum(measure.share_right(theirs), 1e-9)


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
    """Metadata in the form of the hub's model cards, for each students' mode."""
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
    percent = _measure(report["score"]).percent
    score, scale, difference = (".1%", 100, "+.1f") if percent else (".2f", 1, "+.2f")
    cells = []
    for row in report["rows"]:
        low, high = row["interval"]
        line = [row["mode"], str(len(row["seeds"])), f"{row['score']:{score}} [{low:{score}}, {high:{score}}]"]
        if "difference" in row:
            (low, high), (least, most) = row["difference_interval"], row["retained_interval"]
            middle, low, high = (format(scale * x, difference) for x in (row["difference"], low, high))
            line.append(f"{middle} [{low}, {high}]" + (" points" if percent else ""))
            line.append(f"{row['retained']:.1%} [{least:.1%}, {most:.1%}]")
        else:
            line += ["", ""]
        cells.append([*line, f"{row['parameters']:,}"])
    return header, cells


NOTE = (
    "Means over seeds. Intervals: paired bootstrap over seeds and over the clips, sentences or blocks of the split "
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


def _whose(shift: dict) -> str:
    """Whose feature shift it is: the seed says it, where all teachers are of one row."""
    return ("" if shift["mode"] == "teacher" else f"{shift['mode']}, ") + f"seed {shift['seed']}"


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
        shifts = [f"- {_whose(shift)}: {shift['advice']}" for shift in report["feature_shift"]]
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
    for shift in report["feature_shift"]:
        whose = _whose(shift)
        body.append(f"<p>{html.escape(whose[0].upper() + whose[1:])}: {html.escape(shift['advice'])}</p>")
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
    axis.set(
        yticks=range(len(rows)), yticklabels=[textwrap.fill(row["mode"], 64) for row in rows], xlabel=report["score"]
    )
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
        axis.plot(layers, shift["layers"], marker="o", label=_whose(shift))
    axis.axhline(FAR, color="grey", linestyle=":")
    axis.set(xlabel="layer", ylabel="cosine distance", xticks=list(layers))
    axis.grid(alpha=0.3)
    axis.legend()
    return _png(figure)
