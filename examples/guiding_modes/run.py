"""Every guiding mode on the demo's recorded speech, by the demo's recipe, and a report of all of them.

    python examples/guiding_modes/run.py --out runs/modes --steps 60 --seeds 0 1

For each seed a teacher is trained from scratch on the language spoken (the demo has no pretrained model, so "source" is
a new model of its shape); then each mode trains a student.
"""

import argparse
import shutil
from pathlib import Path

from linconv import pipeline
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and the report")
    parser.add_argument("--data", type=Path, help="audio folder; None: the demo's recordings, fetched")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of every run")
    parser.add_argument("--batch", type=int, default=16, help="clips a batch")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a teacher and its students for each")
    options = parser.parse_args()
    data = options.data or fetch()
    for seed in options.seeds:
        folder = options.out / f"seed-{seed}"
        shared = [("data.path", str(data)), ("seed", seed), ("model.teacher", str(folder / "teacher"))]
        for block in ("finetune", "distill"):
            changes = {"max_steps": options.steps, "warmup_steps": options.steps // 10, "logging_steps": 5}
            changes["per_device_train_batch_size"] = options.batch
            shared += [(f"{block}.{key}", value) for key, value in changes.items()]
        _execute(pipeline.finetune(load_recipe(RECIPE, [*shared, ("model.waypoints", 6)])))
        for name, guide in MODES.items():
            given = [(f"guide.{key}", value) for key, value in guide.items()]
            if guide["name"] == "hybrid":
                given.append(("guide.drop_layer_loss_at", round(HYBRID_SHARE * options.steps)))
            _execute(pipeline.distill(load_recipe(RECIPE, [*shared, *given, ("output", str(folder / name))])))
        for snapshot in folder.glob("teacher/waypoints"):
            shutil.rmtree(snapshot)


def _execute(run: pipeline.Run) -> None:
    print(run.title, {key: round(value, 4) for key, value in run.execute().items()}, flush=True)


if __name__ == "__main__":
    main()
