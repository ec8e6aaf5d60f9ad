import csv
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import processes
import pytest
import soundfile
import torch
import yaml
from audio_folder import make_folder

from linconv import pipeline
from linconv.cli import _layers, main
from linconv.distillation import DistillationTrainer
from linconv.errors import UserError, check_output
from linconv.recipe import load_recipe

WAV2VEC2 = {
    "model_type": "wav2vec2",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": [8, 8],
    "conv_stride": [16, 8],
    "conv_kernel": [20, 10],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "classifier_proj_size": 8,
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "words")


def recipe(folder, data, **changes):
    training = {
        "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1, "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    tree = {
        "task": "classification",
        "data": {"path": str(data), "label": "word", "text": "sentence"},
        "model": {"config": WAV2VEC2, "teacher": str(folder / "teacher")},
        "output": str(folder / "student"),
        "conversion": {"mixer": "bimamba2", "options": {"d_state": 8, "headdim": 8}},
        "finetune": training,
        "distill": training,
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def linconv(*argv, status=0):
    assert main([str(a) for a in argv]) == status


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """A teacher and its student, through the command line, and two sentences beside them."""
    folder = tmp_path_factory.mktemp("run")
    path = recipe(folder, data)
    linconv("finetune", path)
    linconv("distill", path)
    (folder / "text").mkdir()
    (folder / "text" / "train.tsv").write_text("sentence\tlabel\ngood film\tyes\nbad film\tno\n")
    return folder, path


def test_finetune_and_distill_leave_models_scores_and_metrics(trained):
    folder, _ = trained
    teacher = json.loads((folder / "teacher" / "config.json").read_text())
    assert teacher["id2label"] == {"0": "one", "1": "three", "2": "two"}
    student = json.loads((folder / "student" / "config.json").read_text())
    assert student["architectures"] == ["LinconvWav2Vec2ForSequenceClassification"]
    assert student["linconv"]["layers"] == [0, 1] and student["id2label"] == teacher["id2label"]
    results = json.loads((folder / "student" / "results.json").read_text())
    assert 0 <= results["scores"]["test_accuracy"] <= 1
    assert results["recipe"]["conversion"]["mixer"] == "bimamba2"
    lines = [json.loads(line) for line in (folder / "student" / "metrics.jsonl").read_text().splitlines()]
    assert [len(r["layer_mse"]) for r in lines if "layer_mse" in r] == [2, 2]


def test_every_mode_by_its_name_and_a_report_of_them(tmp_path, data, capsys):
    folder = tmp_path
    path = recipe(folder, data)
    teacher = folder / "teacher"
    (teacher / "waypoints" / "checkpoint-77").mkdir(
        parents=True
    )  # of a longer run, which would lead between this one's
    linconv("finetune", path, "--set", "model.waypoints=2")
    steps = [int(p.name.rpartition("-")[2]) for p in sorted((teacher / "waypoints").iterdir())]
    assert len(steps) == 2 and (teacher / "waypoints" / f"checkpoint-{steps[0]}" / "model.safetensors").is_file()
    runs = [teacher]
    for mode, options in (
        ("trajectory_guided", ["--set", "guide.update_every=1"]),
        ("waypoint_guided", ["--set", f"guide.checkpoints={teacher / 'waypoints'}"]),
        ("hybrid", ["--set", "guide.mode=waypoint_guided", "--set", "guide.drop_layer_loss_at=1"]),
    ):
        runs.append(folder / mode)
        linconv("distill", path, "--mode", mode, "--output", runs[-1], *options)
    capsys.readouterr()
    linconv("report", *runs, "--output", folder / "report")
    printed = capsys.readouterr().out
    for name in ("teacher", "trajectory-guided (update_every 1)", "waypoint-guided", "hybrid of waypoint-guided"):
        assert name in printed
    made = json.loads((folder / "report" / "report.json").read_text())
    assert len(made["trajectories"]) == 1 + 3 * 2 and len(made["feature_shift"]) == 1


def test_eval_gives_the_scores_of_the_run_again(trained, capsys):
    folder, path = trained
    for name in ("teacher", "student"):
        capsys.readouterr()
        linconv("eval", folder / name, path, "--json")
        scores = json.loads(capsys.readouterr().out)
        want = json.loads((folder / name / "results.json").read_text())["scores"]
        assert scores["clips"] == 6
        assert scores["test_accuracy"] == want["test_accuracy"]
        assert scores["test_loss"] == pytest.approx(want["test_loss"], rel=1e-5)
    linconv("eval", folder / "teacher", path, "--split", "validation")
    assert "validation_accuracy" in capsys.readouterr().out


def test_dry_run_says_what_would_be_done_and_leaves_nothing(trained, tmp_path, capsys):
    folder, path = trained
    output = tmp_path / "new"
    linconv("distill", path, "--output", output, "--mixer", "hydra", "--mode", "hybrid", "--dry-run",
            "--set", "guide.drop_layer_loss_at=1", "--steps", 7, "--layers", "1",
            "--set", f"distill.teacher_cache={tmp_path / 'cache'}",
            "--set", "model.overrides.apply_spec_augment=false")  # fmt: skip
    said = capsys.readouterr().out
    assert "hydra (1 layers)" in said and "drop_layer_loss_at=1" in said and "7 steps" in said and "9 train" in said
    assert not list(tmp_path.iterdir())


@pytest.fixture
def broken(data, tmp_path):
    """A copy of the data to damage, and a recipe for it."""
    import shutil

    shutil.copytree(data, tmp_path / "words")
    return tmp_path / "words", recipe(tmp_path, tmp_path / "words")


def test_dry_run_looks_at_every_clip(broken, capsys):
    import numpy as np
    import soundfile

    folder, path = broken
    (folder / "two_2.flac").write_bytes(b"not sound")
    whole = (folder / "one_0.flac").read_bytes()
    (folder / "one_0.flac").write_bytes(whole[: len(whole) // 2])
    soundfile.write(folder / "three_3.flac", np.zeros(20), 16000)
    soundfile.write(folder / "three_5.flac", np.zeros(0), 16000)
    linconv("finetune", path, "--dry-run", status=2)
    said = capsys.readouterr().err
    assert "data: 4 of 18 clips cannot be used: " in said and said.strip().endswith("; and 1 more")
    assert f"{folder / 'one_0.flac'}: not a sound file" in said and f"{folder / 'two_2.flac'}: not a sound file" in said
    assert "three_3.flac: 0.00125 s; want 0.01025 s at least" in said  # conv_kernel and conv_stride above


@pytest.mark.parametrize("workers", [0, 1])
def test_a_clip_that_cannot_be_read_is_told_in_one_line(broken, workers, capfd):
    folder, path = broken
    (folder / "two_0.flac").write_bytes(b"not sound")
    linconv("finetune", path, "--set", f"finetune.dataloader_num_workers={workers}", status=2)
    said = capfd.readouterr().err.strip().splitlines()
    assert said[-1].startswith(f"linconv: error: {folder / 'two_0.flac'}: not a sound file") and "Traceback" not in said


@pytest.mark.parametrize("every", [1, 500])
def test_training_that_diverges_is_told_in_one_line(broken, every, capfd):
    """Also behind the last record."""
    sets = ("--set", "finetune.learning_rate=1e30", "--set", f"finetune.logging_steps={every}")
    linconv("finetune", broken[1], *sets, status=2)
    said = capfd.readouterr().err
    assert "linconv: error: training has diverged: at step " in said and "Traceback" not in said
    assert not (broken[0].parent / "teacher" / "results.json").exists()


def test_an_optimizer_that_hooks_itself_on_a_model_is_tried_on_another(data, tmp_path, monkeypatch):
    """As layer-wise ones do, which take their steps in the backward pass."""
    steps = []

    def hooked(args, model):
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _: steps.append(args.optim_args))
        return torch.optim.SGD, {"lr": 0.1, "momentum": 0.5 if args.optim_args else 0.0}

    monkeypatch.setattr(DistillationTrainer, "get_optimizer_cls_and_kwargs", staticmethod(hooked))
    settings = [("finetune.optim_args", "momentum=0.5"), ("finetune.gradient_checkpointing", True)]
    compiled = [("finetune.torch_compile", True), ("finetune.torch_compile_backend", "eager")]
    run = pipeline.finetune(load_recipe(recipe(tmp_path, data), settings + compiled))
    sum(parameter.sum() for parameter in run.trainer.model.parameters()).backward()
    assert not steps and run.trainer.optimizer is None


def test_a_run_without_a_batch_is_no_trained_model(data, tmp_path, capsys):
    path = recipe(tmp_path, data)
    linconv("finetune", path, "--batch", "64", "--set", "finetune.dataloader_drop_last=true", status=2)
    assert "data.train: not enough for one batch, so nothing was trained; want" in capsys.readouterr().err
    assert not (tmp_path / "teacher" / "results.json").exists()


def test_transcripts_of_a_split_may_not_all_be_empty(broken, capsys):
    folder, path = broken
    table = folder / "metadata.csv"
    table.write_text(re.sub('"Say .*"(,.*,test)', r"?!\1", table.read_text()))
    linconv("finetune", path, "--task", "ctc", status=2)
    assert "data.text: every transcript of the split test is empty" in capsys.readouterr().err


def test_a_clip_of_the_shortest_length_has_a_frame(data, tmp_path):
    run = pipeline.finetune(load_recipe(recipe(tmp_path, data)))
    seconds = pipeline.preprocessing.shortest_clip(run.trainer.model, run.trainer.data_collator.feature_extractor)
    shortest = round(16000 * seconds)
    frame_lengths = pipeline.checkpoints.family_of("wav2vec2", "").frame_lengths
    for samples, frames in ((shortest - 1, 0), (shortest, 1)):
        assert frame_lengths(run.trainer.model, torch.tensor(samples)) == frames


def test_dry_run_names_the_classes_and_what_is_in_the_way(trained, tmp_path, capsys):
    _, path = trained
    flags = ["--output", tmp_path / "out", "--set", "distill.save_strategy=steps", "--set", "distill.save_steps=1"]
    linconv("distill", path, *flags, "--dry-run", "--resume", status=2)
    assert "--resume: no complete checkpoint" in capsys.readouterr().err
    linconv("distill", path, *flags)
    linconv("distill", path, *flags, "--dry-run", status=2)
    assert "is of an earlier run; want --resume" in capsys.readouterr().err
    linconv("distill", path, *flags, "--dry-run", "--resume")
    assert "3: one, three, two" in capsys.readouterr().out


def test_a_text_model_is_not_evaluated_on_speech(trained, tmp_path, capsys):
    from transformers import BertConfig, BertForSequenceClassification

    _, path = trained
    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50)
    BertForSequenceClassification(BertConfig(**size)).save_pretrained(tmp_path / "bert")
    linconv("eval", tmp_path / "bert", path, status=2)
    said = capsys.readouterr().err
    assert f"task: got classification, but checkpoint {tmp_path / 'bert'} is a BertForSequenceClassification" in said
    assert said.strip().endswith("want text_classification")


def test_resume_goes_on_from_the_last_checkpoint(trained, tmp_path, capsys):
    _, path = trained
    flags = (
        "distill",
        path,
        "--output",
        tmp_path / "out",
        "--set",
        "distill.save_strategy=steps",
        "--set",
        "distill.save_steps=2",
    )
    linconv(*flags, "--resume", status=2)
    assert "no complete checkpoint" in capsys.readouterr().err
    linconv(*flags)
    linconv(*flags, "--steps", 3, "--resume")
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3]


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """64 clips to train on, each of another length, from 0.02 to 0.5 s, and 6 to test."""
    folder = tmp_path_factory.mktemp("unequal")
    draw = np.random.default_rng(0)
    lengths = draw.permutation(np.geomspace(320, 8000, 70).astype(int))
    with open(folder / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "word", "sentence", "split"])
        for i, length in enumerate(lengths):
            soundfile.write(folder / f"{i}.wav", 0.1 * draw.standard_normal(length), 16000)
            table.writerow([f"{i}.wav", ("one", "two")[i % 2], "a", "train" if i < 64 else "test"])
    return folder


def by_length(path, command, *more):
    linconv(command, path, "--batch", 2, "--set", f"{command}.train_sampling_strategy=group_by_length",
            "--set", f"{command}.max_steps=-1", "--set", f"{command}.num_train_epochs=2",
            "--set", f"{command}.save_strategy=steps", "--set", f"{command}.save_steps=40", *more)  # fmt: skip


@pytest.mark.parametrize("task", ["classification", "ctc"])
def test_batches_of_like_lengths_hold_each_clip_once_and_less_padding(unequal, tmp_path, monkeypatch, task):
    from linconv.data import Collator
    from linconv.data.sources import AudioClips

    path = recipe(tmp_path, unequal, task=task)
    collate, batches = Collator.__call__, []

    def collated(self, clips):
        batches.append([len(clip["audio"]) for clip in clips])
        return collate(self, clips)

    read, headers = AudioClips.sounds, []
    monkeypatch.setattr(AudioClips, "sounds", lambda self: headers.append(len(self)) or read(self))
    monkeypatch.setattr(Collator, "__call__", collated)
    share = {}
    for sampling in ("random", "group_by_length"):
        made = pipeline.finetune(
            load_recipe(
                path,
                [
                    ("model.teacher", str(tmp_path / sampling)),
                    ("finetune.max_steps", 16),
                    ("finetune.train_sampling_strategy", sampling),
                ],
            )
        )
        headers.clear(), batches.clear()
        made.execute()
        assert headers == ([64] if sampling == "group_by_length" or task == "ctc" else [])  # read once
        epoch = [batch for batch in batches if len(batch) == 4][:16]
        known = [soundfile.info(file).frames for file in made.splits.train.files]
        assert sorted(length for batch in epoch for length in batch) == sorted(known)
        share[sampling] = 1 - sum(known) / sum(len(batch) * max(batch) for batch in epoch)
    assert share["group_by_length"] < 0.6 * share["random"]


@pytest.mark.parametrize("command", ["finetune", "distill"])
def test_batches_of_like_lengths_resume_in_mid_epoch(unequal, tmp_path, command):
    path = recipe(tmp_path, unequal)
    if command == "distill":
        linconv("finetune", path)
    output = tmp_path / {"finetune": "teacher", "distill": "student"}[command]
    by_length(path, command)  # 2 epochs of 32 steps

    def left():
        records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        losses = [(record["step"], record["loss"]) for record in records if "loss" in record]
        return (output / "model.safetensors").read_bytes(), losses

    whole = left()
    assert len(whole[1]) == 64
    shutil.rmtree(output / "checkpoint-64")
    (output / "model.safetensors").unlink()
    by_length(path, command, "--resume")
    assert left() == whole


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_stream_has_no_batches_of_like_lengths(data, tmp_path, monkeypatch, capsys, dry):
    from types import SimpleNamespace

    from linconv.data import sources

    class Rows(list):
        features = {"audio": None, "word": SimpleNamespace(names=["one", "two"], int2str=["one", "two"].__getitem__)}

    def from_hub(data, column):
        stream = sources.AudioStream(Rows(), data, data.label)
        return {"train": stream, "validation": None, "test": None}

    monkeypatch.setattr(sources, "_from_hub", from_hub)
    linconv("finetune", recipe(tmp_path, "name/clips"), "--set", "data.streaming=true",
            "--set", "finetune.train_sampling_strategy=group_by_length", *dry, status=2)  # fmt: skip
    said = capsys.readouterr().err
    assert "train_sampling_strategy: got group_by_length, and a train_dataset (AudioStream) that is streamed" in said
    assert "data.streaming=false" in said and len(said.strip().splitlines()) == 1


def test_scores_of_clips_stay_in_order_whatever_the_batches(unequal, tmp_path, capsys):
    path = recipe(tmp_path, unequal)
    by_length(path, "finetune")
    scored = json.loads((tmp_path / "teacher" / "results.json").read_text())["clips"]
    made = pipeline.finetune(load_recipe(path, [("model.teacher", str(tmp_path / "other"))]))
    model = pipeline.load_model(str(tmp_path / "teacher"), "teacher").eval()
    wrong = []
    for i in range(len(made.splits.test)):
        batch = made.trainer.data_collator([made.splits.test[i]])
        wrong.append([int(model(**batch).logits.argmax() != batch["labels"]), 1])
    assert scored == wrong and 0 < sum(mistakes for mistakes, _ in wrong) < 6


def test_a_checkpoint_is_gone_on_from_by_its_own_run_only(trained, tmp_path, capsys):
    folder, path = trained
    flags = ["distill", path, "--output", tmp_path / "out", "--set", "distill.save_strategy=steps",
             "--set", "distill.save_steps=1"]  # fmt: skip
    linconv(*flags)
    linconv(*flags, status=2)
    assert "checkpoint-2 is of an earlier run; want --resume" in capsys.readouterr().err
    for change, message in (
        (("--seed", 5), "is of a run with seed 0; got 5"),
        (("--mixer", "hydra"), "is of a run with conversion"),
        (("--set", "distill.save_only_model=true"), "checkpoints saved with save_only_model=true cannot be resumed"),
    ):
        linconv(*flags, *change, "--resume", status=2)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("best", [False, True])
def test_a_run_at_its_end_is_scored_again_and_not_trained(trained, tmp_path, best):
    """With the weights of its last step, or of the one that it took for the best: here that of the largest loss."""
    _, path = trained
    options = ["save_strategy=steps", "save_steps=1", "exponential_decay_to=0.5"]
    if best:
        options += ["load_best_model_at_end=true", "eval_strategy=steps", "eval_steps=1", "greater_is_better=true"]
    flags = ["distill", path, "--output", tmp_path / "out", *(f"--set=distill.{option}" for option in options)]
    linconv(*flags)
    weights = [(tmp_path / "out" / f / "model.safetensors").read_bytes() for f in (".", "checkpoint-1", "checkpoint-2")]
    assert weights[0] == weights[1 if best else 2] and weights[1] != weights[2]

    def left():
        out = tmp_path / "out"
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        records = [record for record in records if "loss" in record]
        scores = json.loads((out / "results.json").read_text())["scores"]
        return (out / "model.safetensors").read_bytes(), records, scores, sorted(p.name for p in out.iterdir())

    before = left()
    linconv(*flags, "--resume")
    assert left() == before


def test_a_shortened_run_says_what_it_never_comes_to(trained, tmp_path):
    _, path = trained
    late = [("distill.warmup_steps", 2), ("guide.name", "hybrid"), ("guide.drop_layer_loss_at", 7)]
    with pytest.warns(UserWarning) as said:
        pipeline.distill(load_recipe(path, [("output", str(tmp_path / "out")), *late]))
    said = [str(warning.message) for warning in said]
    assert "warmup_steps: 2, but training ends at step 2; want it earlier" in said
    assert "guide.drop_layer_loss_at: 7, but training ends at step 2; want it earlier" in said
    with warnings.catch_warnings():  # a fine-tuning is not guided
        warnings.filterwarnings("error", message="guide")
        pipeline.finetune(load_recipe(path, [("model.teacher", str(tmp_path / "teacher")), *late[1:]]))


@pytest.mark.parametrize(
    "task, score, greater",
    [("ctc", "wer", False), ("ctc", "eval_cer", False), ("ctc", "loss", False), ("classification", "accuracy", True)],
)
def test_the_best_checkpoint_is_that_of_the_better_score(data, tmp_path, task, score, greater):
    best = {"metric_for_best_model": score, "load_best_model_at_end": True}
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    path = recipe(tmp_path, data)
    settings = [("task", task), *((f"finetune.{key}", value) for key, value in {**best, **every}.items())]
    assert pipeline.finetune(load_recipe(path, settings)).trainer.args.greater_is_better == greater
    told = [*settings, ("finetune.greater_is_better", not greater)]
    assert pipeline.finetune(load_recipe(path, told)).trainer.args.greater_is_better != greater


def test_what_is_read_is_not_written_over(trained, tmp_path, capsys):
    folder, path = trained
    teacher, file = folder / "teacher", tmp_path / "file"
    file.touch()
    for argv, message in (
        (("distill", path, "--output", teacher), f"output: {teacher} is model.teacher too"),
        (("finetune", path, "--set", f"model.source={teacher}", "--set", "model.config={}", "--teacher", teacher),
         f"model.teacher: {teacher} is model.source too"),
        (("convert", teacher, "--output", teacher), f"--output: {teacher} is MODEL too"),
        (("convert", teacher, "--output", folder / "student"), f"--output: {folder / 'student'} is not empty; want"),
        (("convert", teacher, "--output", file), f"--output: {file} is a file; want a folder"),
        (("distill", path, "--output", file, "--dry-run"), f"output: {file} is a file"),
    ):  # fmt: skip
        linconv(*argv, status=2)
        assert message in capsys.readouterr().err


def test_a_teacher_in_half_precision_is_taken_to_float32(trained, tmp_path):
    from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

    folder, path = trained
    AutoModelForAudioClassification.from_pretrained(folder / "teacher").half().save_pretrained(tmp_path / "half")
    AutoFeatureExtractor.from_pretrained(folder / "teacher").save_pretrained(tmp_path / "half")
    linconv("distill", path, "--teacher", tmp_path / "half", "--output", tmp_path / "out")
    linconv("eval", tmp_path / "half", path)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_overrides_are_those_of_the_student(trained, tmp_path):
    _, path = trained
    linconv("distill", path, "--output", tmp_path / "out", "--set", "model.overrides.hidden_dropout=0.25")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_dropout"] == 0.25
    linconv("distill", path, "--output", tmp_path / "x", "--set", "model.overrides.hiden_dropout=0.2", status=2)


def test_student_of_the_pretrained_model(trained, tmp_path, data, capsys):
    """guide.init: source keeps the weights of model.source, under the fine-tuned teacher."""
    from transformers import AutoModelForAudioClassification

    folder, _ = trained
    source = folder / "teacher"
    changes = {
        "finetune.learning_rate": 0.1,
        "model.config": "{}",
        "model.source": source,
        "model.teacher": tmp_path / "tuned",
    }
    path = recipe(tmp_path, data)
    sets = [x for key, value in changes.items() for x in ("--set", f"{key}={value}")]
    linconv("finetune", path, *sets)
    keep = ["--set", "guide.init=source", "--set", "distill.learning_rate=0.0"]
    linconv("distill", path, *sets, *keep)
    weights = {
        name: dict(AutoModelForAudioClassification.from_pretrained(where).named_parameters())
        for name, where in (("source", source), ("tuned", tmp_path / "tuned"), ("student", tmp_path / "student"))
    }
    name = "wav2vec2.encoder.layers.0.feed_forward.output_dense.weight"
    assert torch.equal(weights["student"][name], weights["source"][name])
    assert not torch.equal(weights["student"][name], weights["tuned"][name])
    linconv("distill", path, "--mode", "unguided", "--set", "model.config={}", "--teacher", source, status=2)
    assert "model.source: not given" in capsys.readouterr().err


def test_ctc_by_way_of_the_command_line(tmp_path, data, capsys):
    path = recipe(tmp_path, data, task="ctc")
    linconv("finetune", path)
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    vocabulary = json.loads((tmp_path / "teacher" / "vocab.json").read_text())
    assert config["vocab_size"] == len(vocabulary) and config["pad_token_id"] == vocabulary["[PAD]"] == 0
    linconv("distill", path)
    capsys.readouterr()
    linconv("eval", tmp_path / "student", path, "--json")
    scores = json.loads(capsys.readouterr().out)
    want = json.loads((tmp_path / "student" / "results.json").read_text())["scores"]
    assert {k: scores[k] for k in ("test_wer", "test_cer")} == {k: want[k] for k in ("test_wer", "test_cer")}
    assert scores["test_cer"] > 0


def ctc_model(folder, letters, outputs=None, **markers):
    """An untrained model with a tokenizer of these letters."""
    from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2ForCTC

    folder.mkdir()
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "|", *letters])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    Wav2Vec2CTCTokenizer(
        str(folder / "vocab.json"),
        pad_token="[PAD]",
        unk_token="[UNK]",
        **{"bos_token": None, "eos_token": None, **markers},
    ).save_pretrained(folder)
    config = {k: v for k, v in WAV2VEC2.items() if k != "model_type"}
    config["vocab_size"] = outputs or len(vocabulary)
    Wav2Vec2ForCTC(Wav2Vec2Config(**config, pad_token_id=0)).save_pretrained(folder)
    return folder


def test_transcripts_are_spelled_as_the_tokenizer_does(tmp_path, data, capsys):
    import string

    path = recipe(tmp_path, data, task="ctc")
    for name, letters in (("capitals", string.ascii_uppercase), ("small", string.ascii_lowercase)):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            run = pipeline.distill(load_recipe(path, [("model.teacher", str(ctc_model(tmp_path / name, letters)))]))
        labels = run.trainer.data_collator([run.splits.train[0]])["labels"][0]
        assert (labels != 1).all() and len(labels) == len(run.splits.train.targets[0])
    most = ctc_model(tmp_path / "most", set(string.ascii_lowercase) - {"w"})
    with pytest.warns(UserWarning, match="the tokenizer has no token for w, which become \\[UNK\\]"):
        pipeline.distill(load_recipe(path, [("model.teacher", str(most))]))
    linconv("distill", path, "--teacher", ctc_model(tmp_path / "greek", "αβγ"), status=2)
    assert "has no token for any character of the transcripts: " in capsys.readouterr().err


def test_a_tokenizers_ids_have_an_output_each(tmp_path, data, capsys):
    import string

    path, letters = recipe(tmp_path, data, task="ctc"), string.ascii_lowercase
    narrow = ctc_model(tmp_path / "narrow", letters, outputs=20)
    wrong = "model: its tokenizer's ids go up to 28; want them below 20, its outputs"
    for argv in (["distill", path, "--teacher", narrow], ["distill", path, "--teacher", narrow, "--dry-run"],
                 ["eval", narrow, path]):  # fmt: skip
        linconv(*argv, status=2)
        assert wrong in capsys.readouterr().err
    # Markers are no part of a transcript: transformers adds them to vocabularies that come without.
    marked = ctc_model(tmp_path / "marked", letters, bos_token="<s>", eos_token="</s>")
    run = pipeline.distill(load_recipe(path, [("model.teacher", str(marked))]))
    assert len(run.trainer.processing_class.tokenizer) == run.trainer.model.config.vocab_size + 2


@pytest.mark.parametrize("command", ["distill", "finetune"])
def test_a_tracker_or_hub_out_of_reach_is_told_in_one_line(trained, tmp_path, monkeypatch, command, capsys):
    from transformers.integrations import integration_utils

    _, path = trained
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    for key, value, message in (
        ("report_to", "wandb", "report_to: WandbCallback requires wandb to be installed"),
        ("push_to_hub", "true", "push_to_hub: Cannot reach "),
    ):
        linconv(command, path, "--set", f"{command}.{key}={value}", "--dry-run", status=2)
        said = capsys.readouterr().err.strip()
        assert said.startswith(f"linconv: error: {message}") and len(said.splitlines()) == 1


def test_clips_too_short_for_their_transcripts_are_told_before_training(tmp_path, data, capsys):
    """Where the loss of such a clip is infinite, as it is with checkpoints of the hub, it would end the run."""
    import string

    path = recipe(tmp_path, data, task="ctc")
    flags = ["distill", path, "--teacher", ctc_model(tmp_path / "small", string.ascii_lowercase)]
    for more in ([], ["--dry-run"]):
        linconv(*flags, *more, status=2)
        said = capsys.readouterr().err
        assert "data.text: 2 of 9 clips to train on are too short for their transcripts: " in said
        # say three twice: 15 tokens, and a blank between two of them
        assert f"{data / 'three_1.flac'}: 13 frames, 16 wanted; " in said
        assert "or model.overrides.ctc_zero_infinity=true: else their loss is infinite" in said
    with pytest.warns(UserWarning, match="2 of 9 clips to train on .* so they teach nothing"):
        linconv(*flags, "--set", "model.overrides.ctc_zero_infinity=true")
    # finetune's own choice is the second, and goes by what is asked for.
    with pytest.warns(UserWarning, match="2 of 9 clips to train on"):
        linconv("finetune", path, "--dry-run")
    linconv("finetune", path, "--dry-run", "--set", "model.overrides.ctc_zero_infinity=false", status=2)
    assert "2 of 9 clips to train on are too short" in capsys.readouterr().err
    records = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(record["task_loss"]) for record in records if "task_loss" in record)


def test_a_checkpoint_without_a_tokenizer_has_none(tmp_path, capsys):
    """Of BERT and RoBERTa transformers makes a tokenizer of special tokens alone."""
    from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50)
    (tmp_path / "text").mkdir()
    for split in ("train", "test"):
        (tmp_path / "text" / f"{split}.tsv").write_text("sentence\tlabel\n" + "good film\tyes\nbad film\tno\n" * 4)
    for name, model in (("bert", BertModel(BertConfig(**size))), ("roberta", RobertaModel(RobertaConfig(**size)))):
        model.save_pretrained(tmp_path / name)
        linconv("finetune", "--task", "text_classification", "--data", tmp_path / "text", "--sentence", "sentence",
                "--label", "label", "--source", tmp_path / name, "--teacher", tmp_path / "out", status=2)  # fmt: skip
        assert "model.source: want a checkpoint with a tokenizer" in capsys.readouterr().err
        linconv("convert", tmp_path / name, "--output", tmp_path / f"{name}2", "--set", "headdim=8")
        assert not list((tmp_path / f"{name}2").glob("tokenizer*"))


def test_whisper_encoder_on_short_clips(tmp_path, data, capsys):
    """Fine-tuned from a speech recognition checkpoint, on the frames that a clip has, then distilled."""
    from transformers import (
        AutoConfig,
        AutoFeatureExtractor,
        AutoModelForAudioClassification,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    from linconv.data import Collator

    whisper = WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=1500, vocab_size=16,
        classifier_proj_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    WhisperForConditionalGeneration(whisper).save_pretrained(tmp_path / "whisper")
    WhisperFeatureExtractor(feature_size=8).save_pretrained(tmp_path / "whisper")
    path = recipe(tmp_path, data, model={"source": str(tmp_path / "whisper"), "teacher": str(tmp_path / "teacher")})
    linconv("finetune", path)
    linconv("distill", path, "--mixer", "hydra")
    linconv("eval", tmp_path / "student", path)
    configs = [AutoConfig.from_pretrained(tmp_path / name) for name in ("teacher", "student")]
    assert [c.linconv["layers"] for c in configs] == [[], [0, 1]]
    # A clip in a padded batch is what it is alone.
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "student")
    student = AutoModelForAudioClassification.from_pretrained(tmp_path / "student")
    noise = torch.randn(12_800).numpy()
    batch = Collator(extractor, int)([{"audio": audio, "target": 0} for audio in (noise, noise[:8_000])])
    padded, alone = student(**batch).logits, Collator(extractor, int)([{"audio": noise[:8_000], "target": 0}])
    torch.testing.assert_close(padded[1:], student(**alone).logits, rtol=0, atol=1e-6)
    # A teacher that starts as the pretrained model hears the same clips.
    linconv("distill", path, "--mode", "trajectory_guided", "--output", tmp_path / "beside")
    records = map(json.loads, (tmp_path / "beside" / "metrics.jsonl").read_text().splitlines())
    assert any("teacher_loss" in record for record in records)
    assert configs[1].linconv["mixer"] == "hydra"
    capsys.readouterr()
    for command in ("finetune", "distill"):
        linconv(command, path, "--set", "model.freeze_feature_encoder=true", status=2)
        assert "model.freeze_feature_encoder: a LinconvWhisperFor" in capsys.readouterr().err


def test_inspect_and_convert(trained, tmp_path, capsys):
    from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

    folder, _ = trained
    sizes = ("--set", "d_state=8", "--set", "headdim=8")
    linconv("inspect", folder / "teacher", "--mixer", "hydra", *sizes)
    assert "crossover" in capsys.readouterr().out
    linconv("convert", folder / "teacher", "--layers", "0-1", "--output", tmp_path / "out", *sizes)
    assert "LinconvWav2Vec2ForSequenceClassification" in capsys.readouterr().out
    model = AutoModelForAudioClassification.from_pretrained(tmp_path / "out")
    assert model.config.linconv["layers"] == [0, 1]
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "out").sampling_rate == 16000


def test_inspect_tells_what_a_converted_checkpoint_is(trained, tmp_path, capsys):
    folder, _ = trained
    linconv("inspect", folder / "student")
    said = capsys.readouterr().out
    assert "LinconvWav2Vec2ForSequenceClassification (wav2vec2): converted already, nothing would be swapped" in said
    assert "  BiMamba2 in 2 of 2 blocks, width 16, where Wav2Vec2Attention was\n  d_state 8, d_conv 4, " in said
    parameters = json.loads((folder / "student" / "results.json").read_text())["parameters"]
    assert f"  parameters {parameters:,}, of the original " in said and "predicted crossover, by operations" in said
    linconv("convert", folder / "teacher", "--layers", "1", "--mixer", "hydra", "--set", "headdim=8", "--output",
            tmp_path / "hybrid")  # fmt: skip
    capsys.readouterr()
    linconv("inspect", tmp_path / "hybrid")
    assert "  Hydra in 1 of 2 blocks (1), width 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, layers",
    [
        ("all", None),
        ("none", []),
        ("0,1, 5", [0, 1, 5]),
        ("0-2", [0, 1, 2]),
        ("-1", [-1]),
        ("0,-3--1", [0, -3, -2, -1]),
    ],
)
def test_layers_are_counted_from_either_end(text, layers):
    assert _layers(text) == layers


def test_inspect_says_where_a_model_has_no_positions(trained, tmp_path, capsys):
    from transformers import RobertaConfig, RobertaModel, WhisperConfig, WhisperForAudioClassification

    folder, _ = trained
    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50)
    RobertaModel(RobertaConfig(**size, max_position_embeddings=514)).save_pretrained(tmp_path / "roberta")
    size = dict(
        d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, decoder_layers=1, vocab_size=50
    )
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    WhisperForAudioClassification(WhisperConfig(**size, **special)).save_pretrained(tmp_path / "whisper")
    cases = (tmp_path / "roberta", "512 tokens"), (tmp_path / "whisper", "1,500 frames"), (folder / "teacher", None)
    for path, limit in cases:
        linconv("inspect", path, "--set", "headdim=8")
        said = capsys.readouterr().out
        assert ("positions" in said) == (limit is not None)
        assert limit is None or f"beyond {limit} these are operations only" in said


@pytest.mark.parametrize("command", ["inspect", "convert", "eval", "distill"])
@pytest.mark.parametrize(
    "file, content, message",
    [
        ("model.safetensors", b"", "Error while deserializing header"),
        ("model.safetensors", None, "Error while deserializing header"),
        ("config.json", b"{", "not a valid JSON file"),
        ("config.json", {"hidden_size": "16"}, "'hidden_size' expected int"),
        ("config.json", {"hidden_size": -16}, "negative dimension"),
        ("config.json", {"num_attention_heads": 0}, "division or modulo by zero"),
        ("config.json", {"num_attention_heads": 3}, "embed_dim must be divisible by num_heads"),
        ("config.json", {"model_type": "linconv-wav2vec2"}, "no 'linconv' block"),
    ],
)
def test_a_checkpoint_that_is_broken_is_named(trained, tmp_path, command, file, content, message, capsys):
    folder, path = trained
    broken = tmp_path / "broken"
    shutil.copytree(folder / "teacher", broken)
    if content is None:  # a download that was cut off
        content = (broken / file).read_bytes()[:1000]
    elif isinstance(content, dict):
        content = json.dumps({**json.loads((broken / file).read_text()), **content}).encode()
    (broken / file).write_bytes(content)
    argv = {
        "inspect": ["--set", "headdim=8"], "convert": ["--output", tmp_path / "out", "--set", "headdim=8"],
        "eval": [path], "distill": [path, "--output", tmp_path / "out", "--teacher", broken],
    }[command]  # fmt: skip
    if command == "inspect" and file == "model.safetensors":  # no weights are read
        return linconv(command, broken, *argv)
    capsys.readouterr()
    linconv(command, *([broken] if command != "distill" else []), *argv, status=2)
    said = capsys.readouterr().err
    assert "linconv: error: " in said and f"{broken}: " in said and message in said and "Traceback" not in said


@pytest.mark.parametrize("command", ["convert", "eval", "distill", "finetune"])
def test_a_checkpoint_without_its_weights_is_no_random_model(trained, tmp_path, command, capsys):
    """transformers warns and draws them."""
    folder, path = trained
    other = tmp_path / "other"
    shutil.copytree(folder / "teacher", other)
    (other / "model.safetensors").unlink()
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, other / "pytorch_model.bin")
    argv = {
        "convert": [other, "--output", tmp_path / "out", "--set", "headdim=8"], "eval": [other, path],
        "distill": [path, "--output", tmp_path / "out", "--teacher", other],
        "finetune": [path, "--teacher", tmp_path / "out", "--source", other, "--set", "model.config={}"],
    }[command]  # fmt: skip
    capsys.readouterr()
    linconv(command, *argv, status=2)
    said = capsys.readouterr().err
    assert f"{other} lacks 32 weights of the blocks of a Wav2Vec2For" in said and not (tmp_path / "out").exists()


def test_a_feature_extractor_that_is_broken_is_not_taken_for_none(trained, tmp_path, capsys):
    folder, path = trained
    broken = tmp_path / "broken"
    shutil.copytree(folder / "teacher", broken)
    (broken / "preprocessor_config.json").write_text("{")
    capsys.readouterr()
    linconv("eval", broken, path, status=2)
    assert f"linconv: error: {broken}: preprocessor_config.json: " in capsys.readouterr().err


def test_names_outside_the_locale(tmp_path, monkeypatch):
    data = make_folder(tmp_path / "words")
    table = (data / "metadata.csv").read_text().replace(",two,", ",größe,")
    (data / "metadata.csv").write_text(table, encoding="utf-8")
    path = recipe(tmp_path, data)
    # What files are opened with where nothing is said, and a terminal that has no more.
    monkeypatch.setattr("io.text_encoding", lambda encoding, stacklevel=2: encoding or "ascii")
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    saves = ("--set", "finetune.save_strategy=steps", "--set", "finetune.save_steps=1")
    linconv("finetune", path, "--set", "model.overrides.label2id={größe: 0}", *saves)  # into the recipe as well
    linconv("finetune", path, "--set", "model.overrides.label2id={größe: 0}", *saves, "--resume", "--steps", 3)
    linconv("report", tmp_path / "teacher", "--output", tmp_path / "report")
    sys.stdout.flush()
    assert b"3: gr\\xf6\\xdfe, one, three" in sys.stdout.buffer.getvalue()


def test_nobody_reads_the_output():
    code = "from linconv.cli import main; import sys; sys.exit(main(['env']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, env={"PYTHONPATH": ":".join(sys.path)}
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_interruption_is_no_traceback(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("linconv.environment.report", interrupt)
    linconv("env", status=130)
    assert capsys.readouterr().err == "linconv: interrupted\n"


@pytest.mark.parametrize("command", ["inspect", "convert", "report"])
def test_a_path_that_the_system_refuses(trained, command, capsys):
    folder, _ = trained
    name = "x" * 300
    given = {"inspect": ["./" + name], "convert": [folder / "teacher", "--output", name], "report": [name]}[command]
    linconv(command, *given, status=2)
    said = capsys.readouterr().err
    assert said.startswith("linconv: error: ") and "xxx" in said and "File name too long" in said


@pytest.mark.parametrize("target", ["nothing", "itself"])
def test_a_folder_that_is_a_link_to_nothing(tmp_path, target):
    link = tmp_path / "link"
    link.symlink_to(link if target == "itself" else tmp_path / "nothing")
    for output in (link, link / "student"):
        with pytest.raises(UserError, match=f"--output: {link} is a link to nothing; want a folder"):
            check_output(str(output), "--output")


def test_a_folder_that_may_not_be_written_to(tmp_path, monkeypatch):
    from linconv import errors

    monkeypatch.setattr(errors.os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(errors.UserError, match=f"--output: {tmp_path} may not be written to; want another folder"):
        errors.check_output(str(tmp_path / "new" / "student"), "--output")


def test_help_version_and_env(capsys):
    linconv()
    assert "distill" in capsys.readouterr().out
    for argv in (["--help"], ["distill", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
    linconv("env")
    assert "torch" in capsys.readouterr().out


def test_help_does_not_wait_for_transformers():
    code = "import sys; from linconv.cli import main; main(['env']) ; assert 'transformers' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, env={"PYTHONPATH": ":".join(sys.path)}
    )


@pytest.fixture(scope="module")
def torch_imported():
    with processes.importing("torch"):
        yield


@pytest.mark.parametrize(
    "argv, package",
    [
        (["inspect", "folder"], "transformers"),
        (["distill", "recipe.yaml"], "yaml"),
        (["bench", "conv", "--out", "new"], "tqdm"),
        (["demo"], "rich"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_without_the_packages_of_the_commands_the_way_to_them_is_told(argv, package, torch_imported, tmp_path):
    (tmp_path / "recipe.yaml").touch()
    absent = f"import os, sys; os.chdir({str(tmp_path)!r}); sys.modules[{package!r}] = None"
    code = f"{absent}; from linconv.cli import main; sys.exit(main({argv!r}))"
    log = tmp_path / "log"
    done = processes.finished(processes.start(log, {}, exec, code, {"__name__": "__main__"}), log)
    said = f"linconv: error: {package} is not installed; pip install 'linconv[models]' brings what commands need\n"
    assert (done.returncode, done.stderr) == (2, said)


MISTAKES = {
    "command": (["distil"], "command: no 'distil'; did you mean 'distill'?"),
    "flag": (["distill", "RECIPE", "--mixr", "x"], "no argument '--mixr'; did you mean '--mixer'?"),
    "shortened flag": (["distill", "RECIPE", "--mix", "x"], "no argument '--mix'; did you mean '--mixer'?"),
    "flag of other commands": (
        ["finetune", "RECIPE", "--mixer", "hydra"], "no argument '--mixer'; it is taken by inspect, convert, distill"
    ),
    "flag of distill": (["finetune", "RECIPE", "--mode=hybrid"], "no argument '--mode'; it is taken by distill"),
    "flag of training": (
        ["eval", "FOLDER/teacher", "RECIPE", "--teacher", "x"],
        "no argument '--teacher'; it is taken by finetune, distill",
    ),
    "flag's value": (["distill", "RECIPE", "--steps", "many"], "--steps: got 'many'; want a whole number above 0"),
    "steps": (["distill", "RECIPE", "--steps", "0"], "argument --steps: got '0'; want a whole number above 0"),
    "rate": (["distill", "RECIPE", "--lr", "-1"], "argument --lr: got '-1'; want a number above 0"),
    "rate that is no number": (["distill", "RECIPE", "--lr", "nan"], "argument --lr: got 'nan'; want a number above 0"),
    "seed": (["distill", "RECIPE", "--seed", "-1"], "seed: got -1; want a whole number from 0 to 4294967295"),
    "seed of mixers": (["convert", "FOLDER/teacher", "--output", "FOLDER/x", "--seed", "-1"],
                       "argument --seed: got '-1'; want a whole number from 0 to 4294967295"),
    "recipe": (["distill", "FOLDER/recip.yaml"], "did you mean 'FOLDER/recipe.yaml'?"),
    "recipe key": (["distill", "RECIPE", "--set", "distill.alpha_dl=1"], "did you mean 'alpha_ld'?"),
    "set": (["distill", "RECIPE", "--set", "seed"], "--set: got 'seed'; want KEY=VALUE"),
    "set twice": (["distill", "RECIPE", "--set", "guide={init: target, init: source}"], "--set guide: not a YAML"),
    "mixer": (["distill", "RECIPE", "--mixer", "bimamba"], "conversion.mixer: no 'bimamba'; did you mean 'bimamba2'?"),
    "mixer option": (
        ["distill", "RECIPE", "--set", "conversion.options.d_stat=8"],
        "conversion.options.d_stat: no 'd_stat'; did you mean 'd_state'?",
    ),
    "layer": (["distill", "RECIPE", "--layers", "0,9"], "layers has 9"),
    "layers": (["distill", "RECIPE", "--layers", "first"], "--layers: got 'first'"),
    "far too many layers": (["inspect", "FOLDER/teacher", "--layers", "0-99999999999"],
                            "--layers: got '0-99999999999'; want such as 0,1,5 or 0-5"),
    "layers from the end": (["convert", "FOLDER/teacher", "--output", "FOLDER/x", "--layers", "1-0"],
                            "--layers: got '1-0'; want such as 0,1,5 or 0-5"),
    "layers over the end": (["distill", "RECIPE", "--layers=-1-1"], "--layers: got '-1-1'; want such as 0,1,5 or 0-5"),
    "layer before the first": (["distill", "RECIPE", "--layers=-3"], "layers has -3, wanted -2 to 1"),
    "number of layer weights": (["distill", "RECIPE", "--set", "distill.layer_weights=[1]", "--dry-run"],
                                "layer_weights: got 1; want 2, one for each hidden state"),
    "layer weights and embeddings": (
        ["distill", "RECIPE", "--set", "distill.layer_weights=[1,1]", "--set", "distill.include_embeddings=true"],
        "layer_weights: got 2; want 3, one for each hidden state",
    ),
    "negative layer weights": (["distill", "RECIPE", "--set", "distill.layer_weights=[1,-2]", "--dry-run"],
                               "layer_weights: got [1.0, -2.0]; want numbers from 0 up"),
    "nothing to learn from": (
        ["distill", "RECIPE", *(f"--set=distill.alpha_{loss}=0" for loss in ("ce", "kd", "ld")), "--dry-run"],
        "alpha_ce, alpha_kd, alpha_ld: got 0, 0, 0; want one above 0 that the mode TargetGuided(init='target') uses",
    ),
    "no loss that a mode uses": (
        ["finetune", "RECIPE", "--set", "finetune.alpha_ce=0"],
        "alpha_ce, alpha_kd, alpha_ld: got 0, 1, 15; want one above 0 that the mode Unguided() uses",
    ),
    "batch": (["distill", "RECIPE", "--set", "distill.per_device_train_batch_size=0"],
              "per_device_train_batch_size: got 0; want a whole number above 0"),
    "order of examples": (
        ["distill", "RECIPE", "--set", "distill.train_sampling_strategy=by_length"],
        "train_sampling_strategy: no 'by_length'; did you mean 'group_by_length'?",
    ),
    "order without a meaning here": (
        ["finetune", "RECIPE", "--set", "finetune.train_sampling_strategy=batch_rebalance"],
        "train_sampling_strategy: no 'batch_rebalance'; known: group_by_length, random, sequential",
    ),
    "optimizer of a package that is not there": (
        ["distill", "RECIPE", "--set", "distill.optim=galore_adamw", "--dry-run"], "optim, optim_args: You need to"
    ),
    "key of another optimizer": (
        ["distill", "RECIPE", "--set", "distill.optim=sgd", "--set", "distill.optim_args=momentum=0.9,rho=1"],
        "optim_args: no 'rho' for the optimizer sgd",
    ),
    "key of an optimizer without its value": (
        ["distill", "RECIPE", "--set", "distill.optim=sgd", "--set", "distill.optim_args=momentum", "--dry-run"],
        "optim_args: got 'momentum'; want KEY=VALUE",
    ),
    "value that an optimizer refuses": (
        ["distill", "RECIPE", "--set", "distill.optim=sgd", "--set", "distill.optim_args=nesterov=true", "--dry-run"],
        "optim, optim_args: Nesterov momentum requires a momentum",
    ),
    "schedule without what it wants": (
        ["distill", "RECIPE", "--set", "distill.lr_scheduler_type=cosine_with_min_lr", "--dry-run"],
        "lr_scheduler_type, lr_scheduler_kwargs: One of min_lr or",
    ),
    "mode of compilation": (
        ["distill", "RECIPE", "--set", "distill.torch_compile=true", "--set", "distill.torch_compile_mode=fast",
         "--dry-run"],
        "torch_compile_backend, torch_compile_mode: Unrecognized mode=fast",
    ),
    "back end of compilation": (
        ["distill", "RECIPE", "--set", "distill.torch_compile_backend=inducter"],
        "torch_compile_backend: no 'inducter'; did you mean 'inductor'?",
    ),
    "key of accelerate": (
        ["distill", "RECIPE", "--set", "distill.accelerator_config={split_batchez: true}"],
        "recipe key distill.accelerator_config.split_batchez: no 'split_batchez'; did you mean 'split_batches'?",
    ),
    "value of accelerate": (
        ["distill", "RECIPE", "--set", "distill.accelerator_config={dispatch_batches: 7}"],
        "distill.accelerator_config.dispatch_batches: got 7; want bool",
    ),
    "key of accelerate's accumulation": (
        ["distill", "RECIPE", "--set", "distill.accelerator_config={gradient_accumulation_kwargs: {num_step: 2}}"],
        "distill.accelerator_config.gradient_accumulation_kwargs.num_step: no 'num_step'; did you mean 'num_steps'?",
    ),
    "file of accelerate": (
        ["distill", "RECIPE", "--set", "distill.accelerator_config=FOLDER/none.json"], "accelerator_config: [Errno 2]"
    ),
    "object that no YAML writes": (
        ["distill", "RECIPE", "--set", "distill.parallelism_config={dp_size: 2}"],
        "distill.parallelism_config: got {'dp_size': 2}; want ParallelismConfig",
    ),
    "argument that transformers does not name": (
        ["distill", "RECIPE", "--set", "distill.debug=all"], "debug: all is not a valid DebugOption"
    ),
    "recomputation": (
        ["distill", "RECIPE", "--set", "distill.gradient_checkpointing=true",
         "--set", "distill.gradient_checkpointing_kwargs={depth: 1}", "--dry-run"],
        "gradient_checkpointing_kwargs: Identity.forward() got an unexpected keyword argument 'depth'",
    ),
    "kernels of a package that is not there": (
        ["distill", "RECIPE", "--set", "distill.use_liger_kernel=true"], "use_liger_kernel: No module named"
    ),
    "batches ahead": (
        ["distill", "RECIPE", "--set", "distill.dataloader_num_workers=1",
         "--set", "distill.dataloader_prefetch_factor=0"],
        "dataloader_prefetch_factor: got 0; want a whole number above 0",
    ),
    "batches kept on a device": (
        ["distill", "RECIPE", "--set", "distill.eval_accumulation_steps=0"],
        "eval_accumulation_steps: got 0; want a whole number above 0",
    ),
    "noise on embeddings that are none": (
        ["finetune", "RECIPE", "--set", "finetune.neftune_noise_alpha=5", "--dry-run"], "neftune_noise_alpha: "
    ),
    "back end of processes": (
        ["distill", "RECIPE", "--set", "distill.ddp_backend=glo"], "distill.ddp_backend: no 'glo'; did you mean 'gloo'?"
    ),
    "no steps": (["distill", "RECIPE", "--set", "distill.max_steps=0"],
                 "max_steps: got 0; want a whole number above 0, or -1 for num_train_epochs"),
    "best score": (["finetune", "RECIPE", "--set", "finetune.metric_for_best_model=acuracy"],
                   "metric_for_best_model: no 'acuracy'; did you mean 'accuracy'?"),
    "cache": (["distill", "RECIPE", "--set", "distill.teacher_cache=RECIPE"], "teacher_cache: RECIPE is a file; want"),
    "no epochs": (["distill", "RECIPE", "--set", "distill.max_steps=-1", "--set", "distill.num_train_epochs=0"],
                  "num_train_epochs: got 0; want a number above 0"),
    "workers": (["finetune", "RECIPE", "--set", "finetune.dataloader_num_workers=-1"],
                "dataloader_num_workers: got -1; want a whole number from 0 up"),
    "beta": (["finetune", "RECIPE", "--set", "finetune.adam_beta1=1"],
             "adam_beta1: got 1; want a number from 0 up, below 1"),
    "weight decay": (["finetune", "RECIPE", "--set", "finetune.weight_decay=-1"], "weight_decay: got -1; want"),
    "negative rate": (["distill", "RECIPE", "--set", "distill.learning_rate=-1"], "learning_rate: got -1; want"),
    "mode": (["distill", "RECIPE", "--mode", "hibrid"], "guide.name: no 'hibrid'; did you mean 'hybrid'?"),
    "mode option": (["distill", "RECIPE", "--set", "guide.drop_kd_at=3"], "drop_kd_at: not an option of the mode"),
    "teacher": (["distill", "RECIPE", "--teacher", "FOLDER/teachr"], "did you mean 'FOLDER/teacher'?"),
    "teacher without config": (["distill", "RECIPE", "--teacher", "DATA"], "no config.json in DATA"),
    "data": (["finetune", "RECIPE", "--data", "DATAS"], "data.path: no folder 'DATAS'; did you mean 'DATA'?"),
    "label": (["finetune", "RECIPE", "--label", "wrod"], "data.label: no 'wrod'; did you mean 'word'?"),
    "model type": (
        ["finetune", "RECIPE", "--set", "model.config.model_type=wav2vec"],
        "model.config.model_type: no 'wav2vec'; did you mean 'wav2vec2'?",
    ),
    "config entry": (
        ["finetune", "RECIPE", "--set", "model.config.hiden_size=8"],
        "model.config.hiden_size: no 'hiden_size'; did you mean 'hidden_size'?",
    ),
    "config that fits no model": (
        ["finetune", "RECIPE", "--set", "model.config.num_attention_heads=3"], "model.config: embed_dim must"
    ),
    "config of no size": (
        ["finetune", "RECIPE", "--set", "model.config.hidden_size=-8"], "model.config: Trying to create tensor with"
    ),
    "config entry of another type": (
        ["finetune", "RECIPE", "--set", "model.config.conv_dim=3"], "model.config: "
    ),
    "overrides of another type": (
        ["distill", "RECIPE", "--set", "model.overrides.conv_dim=3"], "model.overrides: "
    ),
    "activation": (
        ["distill", "RECIPE", "--set", "model.overrides.hidden_act=gelo"],
        "model.overrides.hidden_act: no 'gelo'; did you mean 'gelu'?",
    ),
    "activation of a new model": (
        ["finetune", "RECIPE", "--set", "model.config.hidden_act=3"], "model.config.hidden_act: no '3'; known: "
    ),
    "no output": (["convert", "FOLDER/teacher", "--output", ""], "--output: got ''; want a folder"),
    "report": (["report", "FOLDER/student", "--output", "RECIPE"], "--output: RECIPE is a file; want a folder"),
    "checkpoint": (["eval", "FOLDER/studnt", "RECIPE"], "no folder 'FOLDER/studnt'; did you mean 'FOLDER/student'?"),
    "task of a text": (
        ["eval", "FOLDER/teacher", "RECIPE", "--task", "text_classification"],
        "task: got text_classification, but checkpoint FOLDER/teacher is a Wav2Vec2ForSequenceClassification; "
        "want classification",
    ),
    "task of speech": (
        ["eval", "FOLDER/student", "RECIPE", "--task", "ctc"], "task: got ctc, but checkpoint FOLDER/student is a"
    ),
    "task of the teacher": (
        ["distill", "RECIPE", "--task", "ctc"], "task: got ctc, but model.teacher FOLDER/teacher is a Wav2Vec2For"
    ),
    "task of text without a head": (
        ["finetune", "--task", "text_classification", "--data", "FOLDER/text", "--sentence", "sentence",
         "--label", "label", "--source", "FOLDER/teacher", "--teacher", "FOLDER/x"],
        "task: got text_classification, for which wav2vec2 has no head; want classification or ctc",
    ),
    "task without a head": (
        ["finetune", "RECIPE", "--set", "model.config={model_type: bert}"],
        "task: got classification, for which bert has no head; want text_classification",
    ),
    "labels of other data": (
        ["eval", "FOLDER/teacher", "RECIPE", "--label", "speaker"], "data: label: no 's0'; known: one, three, two"
    ),
    "split": (["eval", "FOLDER/student", "RECIPE", "--split", "tset"], "invalid choice: 'tset'"),
    "inspected model": (["inspect", "FOLDER/teachers"], "no folder 'FOLDER/teachers'; did you mean 'FOLDER/teacher'?"),
    "mixer of a converted model": (
        ["inspect", "FOLDER/student", "--mixer", "hydra"],
        "converted already, of which nothing would be swapped, and got mixer; wanted no mixer, layers and options",
    ),
    "layers of a converted model": (["inspect", "FOLDER/student", "--layers", "1"], "and got layers; wanted no mixer"),
    "conversion of a converted model": (
        ["convert", "FOLDER/student", "--output", "FOLDER/x"], "converted already; wanted a stock model"
    ),
    "inspect mixer": (["inspect", "FOLDER/teacher", "--mixer", "hidra"], "--mixer: no 'hidra'; did you mean 'hydra'?"),
    "convert option": (
        ["convert", "FOLDER/teacher", "--output", "FOLDER/x", "--set", "headim=8"],
        "--set headim: no 'headim'; did you mean 'headdim'?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_line_and_status_2(mistake, trained, data, capsys):
    folder, path = trained
    argv, message = MISTAKES[mistake]

    def fill(text):
        return text.replace("RECIPE", path).replace("FOLDER", str(folder)).replace("DATA", str(data))

    try:
        status = main([fill(a) for a in argv])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr().err.strip()
    assert status == 2
    assert len(said.splitlines()) == 1 and said.startswith("linconv")
    assert fill(message) in said
