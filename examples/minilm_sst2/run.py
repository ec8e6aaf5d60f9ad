#!/usr/bin/env python
"""Fine-tunes, converts and distils MiniLM on SST-2, one cell of the grid at a time.

    run.py --checkpoint MINILM --data SST2 --out RESULTS [--only PATTERN ...] [--limit N] [--set KEY=VALUE ...]

A cell is MODE/SEED, or teacher/SEED, and leaves one JSON file in RESULTS. Finished cells are skipped, so that a run can
be stopped and started again, and several processes can share the grid by --only.

MINILM is a folder with a BERT checkpoint and its tokenizer; SST2 one with train.tsv and dev.tsv (sentence, label).
"""

import argparse
import copy
import fnmatch
import hashlib
import itertools
import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
import yaml

import linconv
from linconv import pipeline
from linconv.benchmarking.machine import provenance
from linconv.recipe import load_recipe


def main():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("recipe.yaml"))
    parser.add_argument("--only", nargs="*", default=["*"], help="cells to run, such as 'hybrid/*'")
    parser.add_argument("--limit", type=int, help="stop after this many cells")
    parser.add_argument("--set", nargs="*", default=[], help="KEY=VALUE of the recipe, such as conversion.options.r=64")
    options = parser.parse_args()
    grid = yaml.safe_load(options.recipe.read_text())

    wanted = [cell for cell in cells(grid["grid"]) if any(fnmatch.fnmatch(cell, p) for p in options.only)]
    left = [cell for cell in wanted if not result_file(options.out, cell).exists()]
    for cell in left[: options.limit]:
        mode, seed = cell.split("/")
        if mode != "teacher" and not result_file(options.out, f"teacher/{seed}").exists():
            sys.exit(f"{cell}: its teacher is not trained yet; run --only 'teacher/*' first")
        start = time.process_time()
        result = run_cell(grid, options, mode, int(seed))
        result |= {"cpu_seconds": time.process_time() - start, "provenance": versions(options.checkpoint)}
        path = result_file(options.out, cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"cell": cell, "mode": mode, "seed": int(seed), **result}, indent=1))
        print(f"{cell}: accuracy {result['accuracy']:.4f}, {result['cpu_seconds']:.0f} s of CPU", flush=True)
    if len(left) <= (options.limit or len(left)):
        print("all wanted cells are finished")


def cells(grid):
    """The names of all cells, seed by seed, each teacher first."""
    for seed, mode in itertools.product(grid["seed"], ["teacher", *grid["mode"]]):
        yield f"{mode}/{seed}"


def result_file(out, cell):
    return out / "cells" / (cell.replace("/", "-") + ".json")


def run_cell(grid, options, mode, seed):
    """Trains one model as `linconv finetune` or `linconv distill` would, and scores it sentence by sentence."""
    recipe = cell_recipe(grid, options, mode, seed)
    run = (pipeline.finetune if mode == "teacher" else pipeline.distill)(recipe)
    run.trainer.train()
    if mode == "teacher":
        run.trainer.save_model()
    prediction = run.trainer.predict(run.splits.test)
    right = (prediction.predictions == prediction.label_ids).tolist()
    return {
        "accuracy": sum(right) / len(right),
        "right": "".join(str(int(r)) for r in right),
        "parameters": sum(p.numel() for p in run.trainer.model.parameters()),
        "history": [record for record in run.trainer.state.log_history if "loss" in record],
        # Folders differ from machine to machine and seed to seed.
        "recipe": {k: v for k, v in asdict(recipe).items() if k in ("task", "conversion", "finetune", "distill")}
        | {"data": {k: v for k, v in asdict(recipe.data).items() if k != "path"}},
        "guide": asdict(recipe.guide),
    }


def cell_recipe(grid, options, mode, seed):
    tree = copy.deepcopy(grid["recipe"])
    tree["seed"] = seed
    tree["data"]["path"] = str(options.data)
    tree["model"] = {"source": str(options.checkpoint), "teacher": str(options.out / "teachers" / str(seed))}
    tree["output"] = str(options.out / "students" / f"{mode}-{seed}")
    if mode != "teacher":
        tree["guide"] = {"name": mode}
        if mode == "hybrid":
            share = grid["hybrid"]["drop_layer_loss_at"]
            tree["guide"]["drop_layer_loss_at"] = round(share * tree["distill"]["max_steps"])
    path = options.out / "recipes" / f"{mode}-{seed}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return load_recipe(
        path, [(key, yaml.safe_load(value)) for key, _, value in (s.partition("=") for s in options.set)]
    )


def versions(checkpoint):
    machine = provenance()
    return {
        "linconv": linconv.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": machine["cpu"],
        "threads": torch.get_num_threads(),
        "checkpoint_sha256": hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


if __name__ == "__main__":
    main()
