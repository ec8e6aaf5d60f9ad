"""Documents, the blocks that are made of them, and the way from them to a distilled language model."""

import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    GPTNeoXModel,
    PreTrainedTokenizerFast,
)

from linconv import pipeline
from linconv.cli import main
from linconv.data import BlockCollator, Blocks, build_bpe_tokenizer, in_blocks, load_splits
from linconv.data.sentences import Sentences
from linconv.errors import UserError
from linconv.recipe import Data, load_recipe

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "to", "mat", "."]
END = "<|endoftext|>"
NEOX = {
    "vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32, "hidden_dropout": 0.0,
}  # fmt: skip
TRAINING = {
    "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2,
    "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def word_tokenizer(**special):
    """A token a word. As Pythia's, it has an end of text and nothing that pads."""
    vocabulary = {token: i for i, token in enumerate([END, "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"unk_token": "[UNK]", "eos_token": END, **special})


def story(i):
    animal, verb, where = ("cat", "dog")[i % 2], ("sat", "ran")[i // 2 % 2], ("on", "to")[i // 2 % 2]
    return " ".join([f"the {animal} {verb} {where} the mat ."] * (1 + i % 3))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Each split in another form: 24 paragraphs, 4 rows of a table, 6 files."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "train.txt").write_text("\n\n".join(map(story, range(24))) + "\n")
    rows = [f'"{story(i)}\n\nthe ""cat""",{i}' for i in range(4)]
    (folder / "validation.csv").write_text("story,number\n" + "\n".join(rows) + "\n")
    (folder / "test" / "more").mkdir(parents=True)
    for i in range(6):
        (folder / "test" / ("more" if i == 5 else "") / f"{i}.txt").write_text(f"{story(i)}\r\n\r\n{story(i + 1)}\n")
    return folder


def save_checkpoint(folder, head=GPTNeoXForCausalLM, tokenizer=True, **changes):
    torch.manual_seed(0)
    head(GPTNeoXConfig(**{**NEOX, **changes})).save_pretrained(folder)
    if tokenizer:
        word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("neox"))


def write_recipe(folder, corpus, checkpoint, **changes):
    tree = {
        "task": "language_modeling",
        "data": {"path": str(corpus), "text": "story", "max_length": 16},
        "model": {"source": str(checkpoint), "teacher": str(folder / "teacher")},
        "output": str(folder / "student"),
        "conversion": {"mixer": "mamba2", "options": {"expand": 1, "d_state": 8, "headdim": 8}},
        "finetune": {**TRAINING, "max_steps": 20, "save_strategy": "no"},
        "distill": {**TRAINING, "layer_norm": False, "include_embeddings": True, "layer_reduction": "sum"},
    }
    for block, entries in changes.items():
        tree[block] = {**tree.get(block, {}), **entries} if isinstance(entries, dict) else entries
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus, checkpoint):
    """A teacher and its student, by way of the command line."""
    folder = tmp_path_factory.mktemp("run")
    path = write_recipe(folder, corpus, checkpoint)
    assert linconv("finetune", path, "--set", "model.waypoints=2") == 0 and linconv("distill", path) == 0
    return folder, path


def linconv(*argv):
    return main([str(a) for a in argv])


def results(folder):
    return json.loads((folder / "results.json").read_text())


def scored(capsys, checkpoint, path, *flags):
    capsys.readouterr()
    assert linconv("eval", checkpoint, path, "--json", *flags) == 0
    return json.loads(capsys.readouterr().out)


# ---- Documents


def load(path, **changes):
    return load_splits(Data(**{"path": str(path), "text": "story", **changes}), "language_modeling")


def test_documents_are_paragraphs_rows_or_files(corpus):
    got = load(corpus)
    assert got.train.texts == [(story(i),) for i in range(24)] and got.labels is None
    assert got.validation.texts == [(f'{story(i)}\n\nthe "cat"',) for i in range(4)]
    assert got.test.texts == [(f"{story(i)}\n\n{story(i + 1)}",) for i in range(6)]
    assert load(corpus, text=None, validation="none").validation is None


def test_long_documents_fit_into_a_table(tmp_path):
    (tmp_path / "train.csv").write_text(f'story\n"{"cat " * 50_000}"\n')
    assert len(load(tmp_path).train.texts[0][0]) == 199_999


def test_shares_and_limits_are_of_documents(corpus):
    whole = load(corpus, validation="none", test="none", holdout={"test": 0.25})
    assert len(whole.test) == 6
    assert sorted([*whole.train.texts, *whole.test.texts]) == sorted((story(i),) for i in range(24))
    few = load(corpus, validation="none", test="none", holdout={"test": 0.25}, limit={"train": 5})
    assert len(few.train) == 5 and set(few.train.texts) <= set(whole.train.texts)
    assert few.test.texts == whole.test.texts


def test_a_data_set_of_the_hub(tmp_path):
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    from linconv.data.sentences import _from_hub

    pyarrow.parquet.write_table(pyarrow.table({"story": ["a", "b c"]}), tmp_path / "train-00000-of-00001.parquet")
    got = _from_hub(Data(path=str(tmp_path)), "data.text", ["story"], None)
    assert got["train"].texts == [("a",), ("b c",)] and got["test"] is None


# ---- Blocks


def test_every_token_is_in_one_block_and_each_document_ends(corpus):
    tokenizer, documents = word_tokenizer(), load(corpus).train
    blocks = in_blocks(documents, tokenizer, 16, "train")
    want = [id for (text,) in documents.texts for id in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    assert [len(block["input_ids"]) for block in blocks] == [16] * (len(want) // 16) + [len(want) % 16]
    assert np.concatenate([block["input_ids"] for block in blocks]).tolist() == want
    assert (blocks.tokens, blocks.documents) == (len(want), 24) and want.count(tokenizer.eos_token_id) == 24


def test_portions_and_empty_documents_change_nothing(corpus, monkeypatch):
    tokenizer, documents = word_tokenizer(), load(corpus).train
    whole = in_blocks(documents, tokenizer, 16, "train")
    some = Sentences([("",), *documents.texts], [""] * 25)
    monkeypatch.setattr("linconv.data.documents.CHARACTERS_AT_ONCE", 50)
    parts = in_blocks(some, tokenizer, 16, "train")
    assert parts.documents == 24 and len(parts) == len(whole)
    assert all((a["input_ids"] == b["input_ids"]).all() for a, b in zip(parts, whole))


def test_padding_is_no_label_but_the_end_of_text_is():
    blocks = Blocks(np.array([5, 0, 6, 7, 8, 0], dtype=np.int32), 4, 2)
    batch = BlockCollator(0)([blocks[0], blocks[1]])
    assert batch["input_ids"].tolist() == [[5, 0, 6, 7], [8, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 0, 6, 7], [8, 0, -100, -100]]


def test_bytes_are_tokens_where_a_tokenizer_is_built(tmp_path):
    tokenizer = build_bpe_tokenizer(["the cat sat on the mat"] * 3, 260)
    tokenizer.save_pretrained(tmp_path)
    GPTNeoXConfig().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "the cât\n\n  sat ☃"
    assert len(loaded) == 260 and loaded.decode(loaded(text).input_ids) == text
    assert loaded.eos_token_id == loaded.pad_token_id == 0 and len(loaded(" the").input_ids) < 4


# ---- Perplexity


def test_perplexity_is_that_of_every_token_whatever_the_batch(corpus, checkpoint, tmp_path):
    """Against a plain loop, block by block, of the stock model; the last block is shorter than the others."""
    tokenizer, model = word_tokenizer(), GPTNeoXForCausalLM.from_pretrained(checkpoint).eval()
    blocks = in_blocks(load(corpus).test, tokenizer, 16, "test")
    assert len(blocks) % 3 and len(blocks[-1]["input_ids"]) < 16
    nats = tokens = 0
    for block in blocks:
        ids = torch.from_numpy(block["input_ids"]).long()[None]
        with torch.no_grad():
            log_probs = model(ids).logits.double().log_softmax(-1)[0, :-1]
        nats -= float(log_probs.gather(1, ids[0, 1:, None]).sum())
        tokens += ids.shape[1] - 1
    for batch in (1, 3, 64):
        path = write_recipe(tmp_path, corpus, checkpoint, distill={"per_device_eval_batch_size": batch})
        scores = pipeline.evaluate(str(checkpoint), load_recipe(path))
        assert scores["blocks"] == len(blocks)
        assert scores["test_nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
        assert scores["test_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_logits_are_reduced_batch_by_batch(corpus, checkpoint, tmp_path):
    path = write_recipe(tmp_path, corpus, checkpoint)
    run = pipeline.finetune(load_recipe(path), str(tmp_path / "unused"))
    predictions = run.trainer.predict(run.splits.test).predictions
    assert predictions.shape == (len(run.splits.test), 2)
    assert predictions[:, 1].tolist() == [len(block["input_ids"]) - 1 for block in run.splits.test]


# ---- Runs


def test_finetune_lowers_perplexity_and_distill_follows(trained, checkpoint, capsys):
    folder, path = trained
    before = scored(capsys, checkpoint, path)["test_perplexity"]
    teacher, student = (results(folder / name) for name in ("teacher", "student"))
    assert teacher["scores"]["test_perplexity"] < 0.7 * before
    nats, tokens = np.sum(student["clips"], axis=0)
    assert student["scores"]["test_perplexity"] == pytest.approx(math.exp(nats / tokens))
    assert json.loads((folder / "student" / "config.json").read_text())["linconv"]["layers"] == [0, 1]
    records = [json.loads(line) for line in (folder / "student" / "metrics.jsonl").read_text().splitlines()]
    assert [len(r["layer_mse"]) for r in records if "layer_mse" in r] == [3] * 4  # embeddings among them


def test_eval_of_the_folder_gives_the_score_of_the_run(trained, capsys):
    folder, path = trained
    for name in ("teacher", "student"):
        got, want = scored(capsys, folder / name, path), results(folder / name)["scores"]
        assert got["test_perplexity"] == pytest.approx(want["test_perplexity"], rel=1e-6)
    assert scored(capsys, folder / "student", path, "--split", "validation")["validation_perplexity"] > 1


def test_report_of_teacher_and_student(trained, tmp_path, capsys):
    folder, _ = trained
    assert linconv("report", folder / "student", folder / "teacher", "--output", tmp_path) == 0
    teacher, student = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert teacher["mode"] == "teacher" and student["score"] == results(folder / "student")["scores"]["test_perplexity"]
    assert student["retained"] == pytest.approx(teacher["score"] / student["score"])
    low, high = student["interval"]
    assert low < student["score"] < high
    assert f"{student['score']:.2f} [" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("target_guided", ["guide.init=source"]),
        ("trajectory_guided", ["guide.update_every=1"]),
        ("waypoint_guided", []),
        ("hybrid", ["guide.mode=target_guided", "guide.drop_layer_loss_at=2"]),
        ("unguided", []),
    ],
)
def test_every_mode_runs_and_resumes(trained, tmp_path, mode, options):
    _, path = trained
    flags = ["--mode", mode, *(word for option in options for word in ("--set", option))]
    assert linconv("distill", path, *flags, "--output", tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    assert linconv("distill", path, *flags, "--output", tmp_path / "resumed", "--resume") == 0
    whole, resumed = (results(tmp_path / name) for name in ("whole", "resumed"))
    assert resumed["scores"] == whole["scores"] and resumed["clips"] == whole["clips"]


def test_blocks_have_lengths(trained, tmp_path):
    changes = [("output", str(tmp_path)), ("distill.train_sampling_strategy", "group_by_length")]
    made = pipeline.distill(load_recipe(trained[1], changes))
    made.execute()
    blocks = made.splits.train
    assert made.trainer.lengths == [len(blocks[i]["input_ids"]) for i in range(len(blocks))]
    assert len(set(made.trainer.lengths)) == 2  # the last block is shorter


def test_finetuning_resumes(trained, tmp_path):
    _, path = trained
    flags = ["--teacher", tmp_path / "teacher", "--steps", 4, "--set", "finetune.save_strategy=steps"]
    assert linconv("finetune", path, *flags) == 0
    whole = results(tmp_path / "teacher")
    shutil.rmtree(tmp_path / "teacher" / "checkpoint-4")
    assert linconv("finetune", path, *flags, "--resume") == 0
    assert results(tmp_path / "teacher")["clips"] == whole["clips"]


def test_from_scratch_with_a_tokenizer_of_its_own(tmp_path, corpus, capsys):
    config = {**NEOX, "model_type": "gpt_neox", "vocab_size": 300}
    path = write_recipe(tmp_path, corpus, "", model={"source": None, "config": config})
    assert linconv("finetune", path) == 0 and linconv("distill", path, "--set", "guide.init=source") == 0
    saved = json.loads((tmp_path / "student" / "config.json").read_text())
    assert saved["vocab_size"] == len(AutoTokenizer.from_pretrained(tmp_path / "student")) <= 300
    got = scored(capsys, tmp_path / "student", path)["test_perplexity"]
    assert got == pytest.approx(results(tmp_path / "student")["scores"]["test_perplexity"], rel=1e-6)


TOLD = """
import os, sys
from linconv import cli, pipeline
in_blocks = pipeline.preprocessing.in_blocks
def told(*arguments):
    print(f"tokenised {arguments[-1]} in process {os.environ['RANK']}", flush=True)
    return in_blocks(*arguments)
pipeline.preprocessing.in_blocks = told
sys.exit(cli.main(sys.argv[1:]))
"""


def test_one_process_of_several_tokenises(trained, tmp_path):
    folder, path = trained
    (tmp_path / "told.py").write_text(TOLD)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [
        str(tmp_path / "told.py"),
        "finetune",
        str(path),
        "--teacher",
        str(tmp_path / "teacher"),
        "--batch",
        "2",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert [ran.stdout.count(f"in process {rank}") for rank in (0, 1)] == [3, 0]
    got, want = (results(where / "teacher")["scores"]["test_perplexity"] for where in (tmp_path, folder))
    assert got == pytest.approx(want, rel=1e-3)  # batches of 2 in both are those of 4 in one


def test_dry_run_tells_documents_tokens_and_blocks(trained, corpus, tmp_path, capsys):
    _, path = trained
    capsys.readouterr()
    assert linconv("distill", path, "--output", tmp_path / "new", "--dry-run") == 0
    printed = capsys.readouterr().out
    tokens = in_blocks(load(corpus).train, word_tokenizer(), 16, "train").tokens
    assert f"{tokens:,} train of 24 documents" in printed and "; 16 a block" in printed
    assert f"{-(-tokens // 16)} train" in printed and not (tmp_path / "new").exists()


def test_blocks_are_as_long_as_the_model_has_positions_for(tmp_path, corpus, checkpoint):
    path = write_recipe(tmp_path, corpus, checkpoint, data={"max_length": None})
    assert pipeline.finetune(load_recipe(path), str(tmp_path / "unused")).splits.train.length == 32
    large = save_checkpoint(tmp_path / "large", max_position_embeddings=4096)
    path = write_recipe(tmp_path, corpus, large, data={"max_length": None})
    assert pipeline.finetune(load_recipe(path), str(tmp_path / "unused")).splits.train.length == 1024


def test_a_student_without_attention_is_scored_beyond_the_positions_of_its_teacher(trained, capsys):
    folder, path = trained
    found = scored(capsys, folder / "student", path, "--set", "data.max_length=100")
    longer, shorter = found["blocks"], scored(capsys, folder / "student", path)["blocks"]
    assert longer < shorter and found["test_perplexity"] > 1
    assert linconv("eval", folder / "teacher", path, "--set", "data.max_length=100") == 2
    assert "data.max_length: got 100; want 2 to 32, which the model has positions for" in capsys.readouterr().err


# ---- A decoder's classes


def test_classes_of_a_decoder_without_a_token_that_pads(tmp_path, checkpoint, capsys):
    rows = [f"{story(i)}\t{int(i % 2)}" for i in range(12)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    data = {"path": str(tmp_path), "sentence": "sentence", "label": "label"}
    path = write_recipe(tmp_path / "run", tmp_path, checkpoint, task="text_classification", data=data)
    assert linconv("finetune", path, "--steps", 60) == 0
    teacher = tmp_path / "run" / "teacher"
    assert results(teacher)["scores"]["test_accuracy"] == 1
    # As one that was fine-tuned elsewhere: nothing pads.
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    word_tokenizer().save_pretrained(teacher)
    assert linconv("distill", path) == 0
    for name in ("teacher", "student"):
        alone, together = (
            scored(capsys, tmp_path / "run" / name, path, "--set", f"distill.per_device_eval_batch_size={batch}")
            for batch in (1, 12)
        )
        assert alone["test_loss"] == pytest.approx(together["test_loss"], rel=1e-4)


# ---- Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"max_length": 1}}, "data.max_length: got 1; want 2 to 32, which the model has positions for"),
        ({"data": {"max_length": 33}}, "data.max_length: got 33; want 2 to 32"),
        ({"data": {"train": "trian"}}, "no 'trian'; did you mean 'train'"),
        ({"data": {"text": None}}, r"data.text: not given; want the column of the text in .*validation.csv"),
        ({"data": {"text": "stroy"}}, "no 'stroy'; did you mean 'story'"),
        ({"data": {"where": {"a": "b"}}}, "are for clips, not for text"),
        ({"data": {"path": None}}, "data.path: not given; want a folder with text for each split"),
        ({"task": "ctc", "data": {"text": None}}, "data.text: not given"),
        ({"model": {"source": None}}, "want one of source"),
        ({"model": {"source": None, "config": {"model_type": "gpt_neox"}}}, "vocab_size: got None; want 257 or more"),
        ({"model": {"source": None, "config": {"model_type": "bert", "vocab_size": 300}}}, "bert has no head"),
    ],
)
def test_wrong_recipes_are_named(tmp_path, corpus, checkpoint, changes, message, capsys):
    path = write_recipe(tmp_path, corpus, checkpoint, **changes)
    with pytest.raises(UserError, match=message):
        pipeline.finetune(load_recipe(path), str(tmp_path / "unused"))


def test_wrong_files_are_named(tmp_path, corpus, checkpoint):
    def finetune(folder, **changes):
        path = write_recipe(tmp_path / "run", folder, checkpoint, **changes)
        return pipeline.finetune(load_recipe(path), str(tmp_path / "unused"))

    with pytest.raises(UserError, match="is a file; want its folder, and data.train=train"):
        finetune(corpus / "train.txt")
    (tmp_path / "train.txt").write_text(" \n\n\n")
    with pytest.raises(UserError, match="train.txt: no text in it"):
        finetune(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="are both train; want one of them"):
        finetune(tmp_path)
    (tmp_path / "train.txt").unlink()
    with pytest.raises(UserError, match=r"train: no \.txt files in it"):
        finetune(tmp_path)
    (tmp_path / "train" / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="a.txt: not UTF-8"):
        finetune(tmp_path)
    with pytest.raises(UserError, match="data.test: no text"):
        (tmp_path / "train" / "a.txt").write_text("the cat\n")
        finetune(tmp_path, data={"holdout": {"test": 0.1}})


def test_wrong_checkpoints_are_named(tmp_path, corpus, checkpoint, trained):
    def finetune(source):
        path = write_recipe(tmp_path / "run", corpus, source)
        return pipeline.finetune(load_recipe(path), str(tmp_path / "unused"))

    with pytest.raises(UserError, match="model.source: want a checkpoint with a tokenizer"):
        finetune(save_checkpoint(tmp_path / "bare", tokenizer=False))
    with pytest.raises(UserError, match="is a GPTNeoXModel; want a checkpoint fine-tuned for the task"):
        finetune(save_checkpoint(tmp_path / "headless", GPTNeoXModel))
    classes = save_checkpoint(tmp_path / "classes", GPTNeoXForSequenceClassification)
    with pytest.raises(UserError, match="is a GPTNeoXForSequenceClassification; want text_classification"):
        finetune(classes)
    recipe = load_recipe(write_recipe(tmp_path / "run", corpus, checkpoint, model={"teacher": str(classes)}))
    with pytest.raises(UserError, match="model.teacher .* is a GPTNeoXForSequenceClassification; want text_cl"):
        pipeline.distill(recipe, str(tmp_path / "unused"))
    with pytest.raises(UserError, match="checkpoint .* is a GPTNeoXForSequenceClassification; want text_cl"):
        pipeline.evaluate(str(classes), recipe)
    word_tokenizer(eos_token=None).save_pretrained(save_checkpoint(tmp_path / "endless"))
    with pytest.raises(UserError, match="no token that pads, and no end of text"):
        finetune(tmp_path / "endless")
    word_tokenizer(eos_token=None, pad_token="[UNK]").save_pretrained(tmp_path / "endless")
    with pytest.raises(UserError, match="no end of text, which stands between documents"):
        finetune(tmp_path / "endless")
    with pytest.raises(UserError, match="its tokenizer's ids go up to 10; want them below 5"):
        finetune(save_checkpoint(tmp_path / "narrow", vocab_size=5))
    folder, path = trained
    with pytest.raises(UserError, match="task: got text_classification, but checkpoint .* want language_modeling"):
        pipeline.evaluate(str(folder / "student"), load_recipe(path, [("task", "text_classification")]))
