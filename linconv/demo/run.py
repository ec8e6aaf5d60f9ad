"""The steps of the demo."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from linconv import pipeline
from linconv.benchmarking import Curve, crossover, latency_curves, memory_curve
from linconv.data.audio import read_audio
from linconv.demo import report
from linconv.demo.fetch import SAMPLE_RATE, Source, fetch, source_of
from linconv.errors import UserError, check_output, no_folder
from linconv.recipe import load_recipe

RECIPE = Path(__file__).with_name("recipe.yaml")
HYBRID_SHARE = 0.6  # of the steps, after which hybrid drops the layer-wise loss
MODES = {"unguided": "unguided", "target-guided": "target_guided", "hybrid": "hybrid"}

# Runs in a process that shares only files with this one.
_RELOAD = """
import sys, torch, linconv.auto
from transformers import AutoModelForAudioClassification
folder, example = sys.argv[1:]
model, saved = AutoModelForAudioClassification.from_pretrained(folder).eval(), torch.load(example)
with torch.inference_mode():
    logits = model(**saved["inputs"]).logits
sys.exit(0 if torch.equal(logits, saved["logits"]) else 1)
"""


@dataclass(frozen=True)
class Row:
    """One line of the table of scores."""

    name: str
    accuracy: float
    parameters: int
    steps: int
    seconds: float


@dataclass
class Results:
    """Everything in the report."""

    source: Source | None
    data: Path
    clips: dict[str, int]
    classes: list[str]
    seed: int
    rows: list[Row] = field(default_factory=list)
    reloaded: bool = False
    latency: dict[str, Curve] = field(default_factory=dict)
    memory: dict[str, Curve] = field(default_factory=dict)
    crossover: float | None = None
    seconds: float = 0.0


def run(options: Namespace) -> Results:
    """Runs the whole demo; ``options`` are those of ``linconv demo``. Writes ``report.md`` and ``report.png``."""
    start = time.perf_counter()
    console = Console()
    check_output(str(options.out), "--out")
    if options.data is None:
        with console.status("fetching recorded speech"):
            data = fetch()
    elif options.data.is_dir():
        data = options.data
    else:
        raise no_folder("--data", str(options.data))
    options.out.mkdir(parents=True, exist_ok=True)

    console.rule("1. Recorded speech")
    overrides = [("data.path", str(data)), ("data.label", options.label), ("seed", options.seed)]
    overrides.append(("model.teacher", str(options.out / "teacher")))
    if options.steps is not None:
        for block in ("finetune", "distill"):
            overrides += [(f"{block}.max_steps", options.steps), (f"{block}.warmup_steps", options.steps // 10)]
    teacher = pipeline.finetune(load_recipe(RECIPE, overrides))
    if teacher.splits.test is None:
        raise UserError(f"{data / 'metadata.csv'}: no clips in the split test, on which the demo scores")
    results = Results(
        source=source_of(data),
        data=data,
        clips={split: len(teacher.splits[split]) for split in ("train", "test")},
        classes=teacher.splits.labels,
        seed=options.seed,
    )
    report.print_data(console, results)

    console.rule("2. A teacher, and its students")
    results.rows.append(_train("teacher", teacher))
    steps = results.rows[0].steps
    for name, mode in MODES.items():
        guide = [("guide.name", mode), ("output", str(options.out / name))]
        if mode == "hybrid":
            guide.append(("guide.drop_layer_loss_at", round(HYBRID_SHARE * steps)))
        student = pipeline.distill(load_recipe(RECIPE, [*overrides, *guide]))
        results.rows.append(_train(name, student))
    report.print_scores(console, results)

    console.rule("3. Saved, and loaded again in a fresh process")
    results.reloaded = _reloads_bit_exactly(student, options.out)
    report.print_reload(console, results)

    console.rule("4. Latency and memory against the length of the audio")
    audio = options.out / "audio.npy"
    np.save(audio, _long_audio(data, max(options.lengths)))
    folders = {"teacher": str(options.out / "teacher"), "student": str(student.output)}
    with console.status("measuring") as status:
        common = {"budget": options.budget, "sampling_rate": SAMPLE_RATE, "report": status.update}
        results.latency = latency_curves(folders, str(audio), options.lengths, **common)
        common["budget"] /= len(folders)
        for name, folder in folders.items():
            results.memory[name] = memory_curve(folder, str(audio), options.lengths, results.latency[name], **common)
    results.crossover = crossover(options.lengths, results.latency["teacher"].values, results.latency["student"].values)
    report.print_speed(console, results)
    results.seconds = time.perf_counter() - start
    report.write(results, options.out)
    console.print(f"\n{results.seconds / 60:.1f} minutes; report: {options.out / 'report.md'}")
    return results


def _train(name: str, made: pipeline.Run) -> Row:
    start = time.perf_counter()
    scores = made.execute()
    model = made.trainer.model
    return Row(
        name=name,
        accuracy=scores["test_accuracy"],
        parameters=sum(p.numel() for p in model.parameters()),
        steps=made.trainer.state.global_step,
        seconds=time.perf_counter() - start,
    )


def _reloads_bit_exactly(made: pipeline.Run, scratch: Path) -> bool:
    """Whether the saved student gives the same logits in a new process as in this one."""
    clips = [made.splits.test[index] for index in range(min(4, len(made.splits.test)))]
    inputs = made.trainer.data_collator(clips)
    inputs.pop("labels")
    model = made.trainer.model.eval()
    with torch.inference_mode():
        logits = model(**inputs).logits
    example = scratch / "example.pt"
    torch.save({"inputs": inputs, "logits": logits}, example)
    return subprocess.run([sys.executable, "-c", _RELOAD, str(made.output), str(example)]).returncode == 0


def _long_audio(data: Path, seconds: float) -> np.ndarray:
    """Concatenates the clips of a folder, repeating them as needed, and standardises: (samples,) float32."""
    with open(data / "metadata.csv", newline="", encoding="utf-8-sig") as file:
        names = [row["file_name"] for row in csv.DictReader(file)]
    wanted, parts, total = round(seconds * SAMPLE_RATE), [], 0
    while total < wanted:
        part = read_audio(data / names[len(parts) % len(names)], SAMPLE_RATE)
        parts.append(part)
        total += len(part)
    audio = np.concatenate(parts)[:wanted].astype(np.float32)
    return (audio - audio.mean()) / audio.std()
