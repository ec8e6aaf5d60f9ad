"""Grouping of a report's runs: the teacher of each student, and runs that differ only in the seed."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from linconv.errors import UserError
from linconv.recipe import Recipe
from linconv.report.runs import RunFolder

__all__ = ["check_apart", "check_clips", "named", "teacher_of"]

# Training arguments that do not affect the model, by prefix: what is written, and where.
_WRITING = ("log_", "logging_", "report_to", "run_name", "project", "trackio_", "disable_tqdm", "push_to_hub", "hub_")
_WRITING += ("resume_from_checkpoint",)
# These too, unless the best checkpoint is kept: then they decide which ones there are to choose from.
_CHOOSING = ("save_", "eval_", "per_device_eval_")
_BLOCKS = ("guide", "conversion", "distill", "finetune", "model", "data", "task")  # in the order of their mention


def teacher_of(student: RunFolder, teachers: list[RunFolder]) -> RunFolder | None:
    """Returns the teacher in the folder that the student's recipe names, or whose own recipe names that folder.

    If there are several, because they were moved, it is the one with the student's seed; None without a single match.
    """
    folder = Path(student.teacher).resolve()
    found = [run for run in teachers if folder in (run.path.resolve(), Path(run.teacher).resolve())]
    if len(found) > 1:
        found = [run for run in found if run.seed == student.seed]
    return found[0] if len(found) == 1 else None


def named(runs: list[RunFolder], teachers: dict[Path, RunFolder | None]) -> list[RunFolder]:
    """Returns the students, or teachers, with modes that name the differences of their recipes other than the seed.

    ``teachers`` maps the students' paths to their teachers.
    """
    found = [_settings(run) for run in runs]
    keys = sorted({key: None for settings in found for key in settings}, key=lambda key: _BLOCKS.index(_block(key)))
    for settings in found:
        settings.update({key: _default(key, settings) for key in keys if key not in settings})
    differing = [key for key in keys if any(settings[key] != found[0][key] for settings in found)]
    words = [_in_words(settings, differing) for settings in found]
    # The teacher is named only if that separates runs that are otherwise the same.
    whose = [[*said, *_of_teacher(teachers.get(run.path))] for said, run in zip(words, runs)]
    if len(set(map(tuple, whose))) > len(set(map(tuple, words))):
        words = whose
    texts = [", ".join(said) for said in words]
    return [
        replace(run, mode=(f"teacher ({text})" if run.is_teacher else text) if text else run.mode)
        for run, text in zip(runs, texts)
    ]


def _settings(run: RunFolder) -> dict[str, Any]:
    """Returns the settings of a run's recipe that affect the model, except the seed: dotted keys and values."""
    recipe = _flat(run.recipe)
    training, others = ("finetune", ()) if run.is_teacher else ("distill", ("conversion",))
    best = recipe.get(f"{training}.load_best_model_at_end")
    left_out = tuple(f"{training}.{name}" for name in (_WRITING if best else _WRITING + _CHOOSING))
    left_out += ("model.teacher", "model.waypoints", "data.path")
    kept = {} if run.is_teacher else {"guide": run.mode}
    for key, value in recipe.items():
        if _block(key) in (training, *others, "model", "data", "task") and not key.startswith(left_out):
            # The path of a cache does not matter, but its use does: cached values are rounded.
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
    """Returns the default for a recipe without the key, or None."""
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
    """Describes the settings; mentions defaults only if there is nothing else to mention."""
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
    # If all teachers are in one row, they are just "teacher", and one that is not in the report may belong to it too.
    return [] if teacher is None or teacher.mode == "teacher" else [f"of {teacher.mode}"]


def check_apart(runs: list[RunFolder], teachers: dict[Path, RunFolder | None]) -> None:
    """Raises UserError if two runs of a row are not separate draws, or were scored on different clips."""
    first = runs[0]
    seen: dict[tuple, RunFolder] = {}
    for run in runs:
        check_clips(first, run)
        teacher = teachers.get(run.path)
        # Students with one seed are separate draws if their teachers are.
        other = seen.setdefault((run.seed, None if teacher is None else teacher.path), run)
        if other is not run:
            raise UserError(
                f"RUN: {other.path} and {run.path} are both {run.mode} with seed {run.seed}; want one run of each seed"
            )


def check_clips(run: RunFolder, other: RunFolder) -> None:
    # The number of words of each clip detects different clips even if there are equally many.
    if not np.array_equal(run.clips[:, 1], other.clips[:, 1]):
        raise UserError(
            f"RUN: {run.path} and {other.path} were scored on different clips, {len(run.clips)} and "
            f"{len(other.clips)}; want the same test split for both"
        )
