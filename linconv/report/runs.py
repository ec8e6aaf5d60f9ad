"""The folder of a finished run, as ``linconv finetune`` and ``linconv distill`` leave it."""

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
        raise UserError(f"RUN: {path} holds other files than a run leaves, or parts of them: {error!r}") from error


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
