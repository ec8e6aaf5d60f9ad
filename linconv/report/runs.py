"""Folders of finished runs, as written by ``linconv finetune`` and ``linconv distill``."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from linconv.errors import UserError

__all__ = ["MEASURES", "Measure", "RunFolder", "measure_of", "read_run"]

RESULTS_FILE, METRICS_FILE, PROBE_FILE = "results.json", "metrics.jsonl", "probe.safetensors"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Measure:
    """A kind of score, computed from a rate: mistakes per clip or word, or nats per token."""

    of_rate: Callable[[np.ndarray], np.ndarray]
    share_right: Callable[[np.ndarray], np.ndarray]  # from the score; students retain a share of it
    lower_is_better: bool
    percent: bool = True  # displayed as a percentage


MEASURES = {
    "accuracy": Measure(lambda rate: 1 - rate, lambda score: score, lower_is_better=False),
    "wer": Measure(lambda rate: rate, lambda score: 1 - score, lower_is_better=True),
    # Its inverse is the geometric mean of the probabilities of the right tokens.
    "perplexity": Measure(np.exp, lambda score: 1 / score, lower_is_better=True, percent=False),
}


@dataclass(frozen=True)
class RunFolder:
    """A run as read from its folder."""

    path: Path
    is_teacher: bool  # whether it was a fine-tuning
    mode: str  # the recipe's, in words; "teacher" for a fine-tuning; in a report, the name of its row
    seed: int
    teacher: str  # the teacher's folder in the recipe; for a teacher, its own
    score: str  # such as test_accuracy
    value: float
    clips: np.ndarray  # (clips, 2): mistakes and total, or nats and tokens
    parameters: int
    records: list[dict]  # the training's log
    recipe: dict
    provenance: dict  # of the training
    probe: dict[str, np.ndarray]  # "student/STEP", "teacher/STEP": (clips, layers, d); empty if there is none

    @property
    def measure(self) -> Measure:
        return measure_of(self.score)


def measure_of(score: str) -> Measure:
    return MEASURES[score.rpartition("_")[2]]


def read_run(folder: str | Path) -> RunFolder:
    """Reads a run's folder.

    Raises:
        UserError: it holds no finished run.
    """
    path = Path(folder)
    if not (path / RESULTS_FILE).is_file():
        raise UserError(f"RUN: no {RESULTS_FILE} in {path}; want the output folder of a finished finetune or distill")
    try:
        return _read(path)
    except (AttributeError, LookupError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"RUN: {path} has missing, incomplete or foreign files: {error!r}") from error


def _read(path: Path) -> RunFolder:
    results = json.loads((path / RESULTS_FILE).read_text(encoding="utf-8"))
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
    """Whether a run was a fine-tuning. Folder names do not tell, since folders are moved and names recur."""
    if "command" in results:
        return results["command"] == "finetune"
    # Results of earlier versions lack the command, but only students are measured against a teacher in training.
    if records or probe:
        measured = any("layer_mse" in record for record in records)
        return not measured and not any(name.startswith("teacher/") for name in probe)
    if (path / CONFIG_FILE).is_file():
        config = json.loads((path / CONFIG_FILE).read_text())
        return not config.get("linconv", {}).get("layers")  # Whisper's teachers are converted with no layers
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
