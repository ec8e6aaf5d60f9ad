#!/usr/bin/env python
"""Fine-tunes, converts and distils Whisper's encoder on the Arabic Speech Commands, one cell of the grid at a time.

    run.py --checkpoint WHISPER --data ARABIC_COMMANDS --out RESULTS [--only PATTERN ...] [--limit N]

A cell is TASK/MIXER/MODE/SEED, or TASK/teacher/SEED, and writes one JSON file in RESULTS/cells. Finished cells are
skipped, so a run can be stopped and started again, and several processes can share the grid by --only.

WHISPER is a transformers checkpoint of Whisper-tiny. ARABIC_COMMANDS is a folder with the Arabic Speech Commands and a
metadata.csv (file_name, word, speaker, split).
"""

import argparse
import fnmatch
import hashlib
import itertools
import json
import os
import platform
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
import yaml
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, Trainer, TrainingArguments

import linconv
import linconv.auto
from linconv.data import Collator, load_splits
from linconv.distillation import DistillationArguments, DistillationTrainer, make_mode
from linconv.recipe import Data

SPLITS = ("train", "validation", "test")
HEAD = ("projector", "classifier")  # modules of the classification head, which no checkpoint has


def main():
    transformers.logging.set_verbosity_error()  # otherwise every load reports the unused decoder
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("recipe.yaml"))
    parser.add_argument("--only", nargs="*", default=["*"], help="cells to run, such as 'word/hydra/*'")
    parser.add_argument("--limit", type=int, help="stop after this many cells")
    options = parser.parse_args()
    recipe = yaml.safe_load(options.recipe.read_text())

    wanted = [cell for cell in cells(recipe["grid"]) if any(fnmatch.fnmatch(cell, p) for p in options.only)]
    left = [cell for cell in wanted if not result_file(options.out, cell).exists()]
    for cell in left[: options.limit]:
        task, mixer, *mode, seed = cell.split("/")
        if mixer != "teacher" and not result_file(options.out, f"{task}/teacher/{seed}").exists():
            sys.exit(f"{cell}: its teacher is not trained yet; run --only '{task}/teacher/*' first")
        run = train_teacher if mixer == "teacher" else train_student
        start = time.process_time()
        result = run(Cell(recipe, options, task, mixer, "".join(mode), int(seed)))
        result |= {"cell": cell, "task": task, "mixer": mixer, "mode": "".join(mode), "seed": int(seed)}
        result |= {
            "cpu_seconds": time.process_time() - start,
            "provenance": provenance(options.checkpoint),
            "recipe": recipe,
        }
        path = result_file(options.out, cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1))
        scores = f"validation {result['validation']:.4f}, test {result['test']:.4f}"
        print(f"{cell}: {scores}, {result['cpu_seconds']:.0f} s of CPU")
    if len(left) <= (options.limit or len(left)):
        print("all wanted cells are finished")


def cells(grid):
    """Yields the names of all cells, teachers first."""
    for task, seed in itertools.product(grid["task"], grid["seed"]):
        yield f"{task}/teacher/{seed}"
    for seed, task, mode, mixer in itertools.product(grid["seed"], grid["task"], grid["mode"], grid["mixer"]):
        yield f"{task}/{mixer}/{mode}/{seed}"


def result_file(out, cell):
    return out / "cells" / (cell.replace("/", "-") + ".json")


class Cell:
    """A cell of the grid: its part of the recipe, its data and its pretrained model."""

    def __init__(self, recipe, options, task, mixer, mode, seed):
        self.recipe, self.options = recipe, options
        self.task, self.mixer, self.mode, self.seed = recipe["tasks"][task], mixer, mode, seed
        self.teacher_folder = options.out / "teachers" / f"{task}-{seed}"
        torch.manual_seed(seed)
        splits = load_splits(Data(path=str(options.data), **self.task["data"]), "classification")
        self.classes = splits.labels
        # Reads every clip once into memory, a few hundred megabytes at most.
        self.data = {name: list(map(splits[name].__getitem__, range(len(splits[name])))) for name in SPLITS}
        extractor = AutoFeatureExtractor.from_pretrained(options.checkpoint)
        self.collator = Collator(extractor, self.classes.index, attention_mask=False)  # all clips are one second

    def pretrained(self):
        """Loads the checkpoint's encoder with a new head."""
        names = dict(enumerate(self.classes))
        return AutoModelForAudioClassification.from_pretrained(
            self.options.checkpoint, id2label=names, label2id={name: i for i, name in names.items()}
        )

    def arguments(self, cls, **more):
        t = self.recipe["training"]
        return cls(
            output_dir=self.options.out / "runs" / f"{os.getpid()}",
            max_steps=self.task["steps"],
            per_device_train_batch_size=t["batch_size"],
            per_device_eval_batch_size=72,
            warmup_steps=round(t["warmup_share"] * self.task["steps"]),
            lr_scheduler_type="cosine",
            bf16=t["bf16"],
            use_cpu=True,
            seed=self.seed,
            save_strategy="no",
            logging_steps=max(self.task["steps"] // 4, 1),
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            **more,
        )

    def optimizer(self, model, kept):
        """Makes AdamW with one learning rate for the weights in ``kept`` and another for new ones and the head."""
        t = self.recipe["training"]
        rates = t["lr"]["teacher" if self.mixer == "teacher" else "student"]
        groups = {}
        for name, parameter in model.named_parameters():
            lr = rates["kept" if name in kept and not name.startswith(HEAD) else "new"]
            decay = t["weight_decay"] if parameter.ndim >= 2 else 0.0
            groups.setdefault((lr, decay), []).append(parameter)
        params = [{"params": p, "lr": lr, "weight_decay": wd} for (lr, wd), p in groups.items()]
        return torch.optim.AdamW(params, fused=True)

    def fit(self, trainer):
        trainer.train()
        scores = {split: trainer.predict(self.data[split]).metrics["test_accuracy"] for split in SPLITS[1:]}
        history = [record for record in trainer.state.log_history if "loss" in record]
        parameters = sum(p.numel() for p in trainer.model.parameters())
        return {**scores, "parameters": parameters, "history": history}

    def common(self, model, kept):
        return {
            "train_dataset": self.data["train"],
            "data_collator": self.collator,
            "optimizers": (self.optimizer(model, kept), None),
            "compute_metrics": lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        }


def any_length(stock):
    """Returns a copy for clips of any length: the stock model accepts only 30 seconds."""
    return linconv.convert(stock, layers=[])


def train_teacher(cell):
    stock = cell.pretrained()
    model = any_length(stock)
    kept = stock.state_dict().keys()
    result = cell.fit(Trainer(model, cell.arguments(TrainingArguments), **cell.common(model, kept)))
    stock.load_state_dict(model.state_dict())
    stock.save_pretrained(cell.teacher_folder)
    return result


def train_student(cell):
    d = dict(cell.recipe["distillation"])
    drop = round(d.pop("drop_layer_loss_at") * cell.task["steps"])
    mode = make_mode(cell.mode, **({"drop_layer_loss_at": drop} if cell.mode == "hybrid" else {}))
    teacher = AutoModelForAudioClassification.from_pretrained(cell.teacher_folder)
    origin = teacher if mode.origin == "target" else cell.pretrained()
    student = linconv.convert(origin, mixer=cell.mixer, **cell.recipe["mixers"][cell.mixer])
    kept = origin.state_dict().keys() & student.state_dict().keys()
    args = cell.arguments(DistillationArguments, **d)
    common = cell.common(student, kept)
    return cell.fit(DistillationTrainer(student, args, teacher=any_length(teacher), mode=mode, **common))


def provenance(checkpoint):
    return {
        "linconv": linconv.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": cpu_name(),
        "threads": torch.get_num_threads(),
        "checkpoint_sha256": hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def cpu_name():
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
