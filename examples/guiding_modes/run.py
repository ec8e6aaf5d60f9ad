#!/usr/bin/env python
"""Trains a teacher and students of all or some guiding modes for each seed, and writes a report of all runs.

    run.py --out runs/spoken_language --seeds 0 1 2
    run.py --out runs/minilm_sst2 --seeds 0 1 2 --recipe minilm_sst2.yaml --source MINILM --data SST2

The default recipe and recordings are the demo's: a model trained from scratch tells which language is spoken, so
"source" is a new model of the teacher's shape. Finished runs are skipped, so it can be stopped and started again.
"""

import argparse
import shutil
from pathlib import Path

import transformers

from linconv import pipeline, report
from linconv.demo.fetch import fetch
from linconv.demo.run import HYBRID_SHARE, RECIPE
from linconv.recipe import load_recipe

MODES = {
    "unguided": {"name": "unguided"},
    "target-guided": {"name": "target_guided", "init": "target"},
    "target-guided-source": {"name": "target_guided", "init": "source"},
    "trajectory-guided": {"name": "trajectory_guided", "update_every": 1},
    "waypoint-guided": {"name": "waypoint_guided"},
    "hybrid": {"name": "hybrid", "mode": "target_guided", "init": "target"},
}
WAYPOINTS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and the report")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="what to train (default: the demo's)")
    parser.add_argument("--source", type=Path, help="the pretrained checkpoint, where the recipe has no model")
    parser.add_argument("--data", type=Path, help="its data (default: the demo's recordings, fetched)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a teacher and its students for each")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="students (default: of all)")
    parser.add_argument("--steps", type=int, help="optimizer steps of every run (default: the recipe's)")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()  # otherwise every load reports the new head
    shared = [("data.path", str(options.data or fetch()))]
    if options.source is not None:
        shared.append(("model.source", str(options.source)))
    if options.steps is not None:
        for block in ("finetune", "distill"):
            shared += [(f"{block}.max_steps", options.steps), (f"{block}.warmup_steps", options.steps // 10)]
    folders = []
    for seed in options.seeds:
        folder = options.out / f"seed-{seed}"
        of_seed = [*shared, ("seed", seed), ("model.teacher", str(folder / "teacher"))]
        teacher = load_recipe(options.recipe, [*of_seed, ("model.waypoints", WAYPOINTS)])
        folders.append(_execute(pipeline.finetune, teacher, folder / "teacher"))
        for name in options.modes:
            guide = MODES[name]
            given = [(f"guide.{key}", value) for key, value in guide.items()]
            if name == "hybrid":
                given.append(("guide.drop_layer_loss_at", round(HYBRID_SHARE * teacher.distill["max_steps"])))
            student = load_recipe(options.recipe, [*of_seed, *given, ("output", str(folder / name))])
            folders.append(_execute(pipeline.distill, student, folder / name))
        shutil.rmtree(folder / "teacher" / pipeline.WAYPOINTS_FOLDER, ignore_errors=True)
    title = f"Every guiding mode on {Path(shared[0][1]).name}"
    print(report.write(report.build(folders, title=title), options.out / "report"))


def _execute(prepare, recipe, folder: Path) -> Path:
    """Executes a run unless it is finished; returns its folder."""
    if not (folder / pipeline.RESULTS_FILE).exists():
        scores = prepare(recipe).execute()
        print(folder, {key: round(value, 4) for key, value in scores.items()}, flush=True)
    return folder


if __name__ == "__main__":
    main()
