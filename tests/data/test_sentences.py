"""Tables of sentences, and the way from them to a distilled student."""

import json
from dataclasses import replace

import pytest
import yaml
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from linconv import pipeline
from linconv.cli import main
from linconv.data import SentenceCollator, Splits, load_splits
from linconv.data.sentences import Sentences
from linconv.errors import UserError
from linconv.recipe import Conversion, Data, Model, Recipe

WORDS = ["good", "fine", "bad", "poor", "film", '"quote', "it", "was"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentences")
    for name, rows in (("train", 24), ("dev", 8)):
        lines = [f'it was {WORDS[i % 4]} {"film " * (i % 3)}"quote \t{int(i % 4 < 2)}' for i in range(rows)]
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
    (folder / "pairs.csv").write_text('a,b,label\n"one, two",three,x\nfour,"five ""six""",y\n')
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, '"', "quote"]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=15, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=20,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def splits(folder, **changes):
    settings = {"path": str(folder), "sentence": "sentence", "label": "label", "validation": "dev", **changes}
    return load_splits(Data(**settings), "text_classification")


def test_a_table_for_each_split(folder):
    got = splits(folder)
    assert (len(got.train), len(got.validation), got.test, got.labels) == (24, 8, None, ["0", "1"])
    assert got.train[1] == {"text": ('it was fine film "quote',), "target": "1"}
    pairs = splits(folder, train="pairs", validation="none", sentence=["a", "b"])
    assert pairs.train.texts == [("one, two", "three"), ("four", 'five "six"')] and pairs.labels == ["x", "y"]


@pytest.mark.parametrize("suffix, separator", [("tsv", "\t"), ("csv", ",")])
def test_rows_of_other_columns_than_the_first_line_are_named(tmp_path, suffix, separator):
    for row in ("bad", "bad, and poor,0"):
        rows = ["sentence,label", "good,1", row]
        (tmp_path / f"train.{suffix}").write_text("\n".join(rows).replace(",", separator))
        columns = row.count(",") + 1
        with pytest.raises(
            UserError, match=f"train.{suffix}: the first line names 2 columns, but line 3 has {columns};"
        ):
            splits(tmp_path)


def test_limit_is_a_fixed_part_and_holdout_is_stratified(folder):
    few, more = (splits(folder, limit={"train": n}).train for n in (5, 9))
    assert (
        len(few) == 5
        and set(few.texts) <= set(more.texts)
        and few.texts == splits(folder, limit={"train": 5}).train.texts
    )
    held = splits(folder, holdout={"test": 0.25})
    assert (len(held.train), len(held.test)) == (18, 6) and held.test.targets.count("1") == 3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sentence": None}, "data.sentence: not given"),
        ({"sentence": "sentense"}, "no 'sentense'; did you mean 'sentence'"),
        ({"label": "labels"}, "no 'labels'; did you mean 'label'"),
        ({"train": "trian"}, "no 'trian'; did you mean 'train'"),
        ({"sentence": ["a", "b", "c"]}, "got 3 columns; want one, or two"),
        ({"limit": {"tset": 3}}, "data.limit: no 'tset'; did you mean 'test'"),
        ({"limit": {"train": 0}}, "data.limit.train: got 0"),
        ({"where": {"label": "1"}}, "are for clips, not for text"),
        ({"holdout": {"test": 1.0}}, "want a share between 0 and 1"),
    ],
)
def test_wrong_settings_are_named(folder, changes, message):
    with pytest.raises(UserError, match=message):
        splits(folder, **changes)


def test_a_batch_is_padded_on_the_right_and_cut(checkpoint):
    tokenizer = BertTokenizerFast.from_pretrained(checkpoint, padding_side="left")
    rows = [{"text": ("it was good",), "target": "1"}, {"text": ("it was bad film film film",), "target": "0"}]
    batch = SentenceCollator(tokenizer, int, 6)(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6] and batch["labels"].tolist() == [1, 0]


def test_lengths_are_those_of_the_batches(checkpoint, monkeypatch):
    from linconv.data import collate

    monkeypatch.setattr(collate, "ROWS_AT_ONCE", 2)
    tokenizer = BertTokenizerFast.from_pretrained(checkpoint)
    for texts, most in (
        ([("it",), ("it was good film",), ("",), ("it was bad film film film",), ("film",)], 6),
        ([("it", "was good"), ("it was", "film film")], None),
    ):
        rows, collator = Sentences(texts, ["0"] * len(texts)), SentenceCollator(tokenizer, int, most)
        alone = [collator([rows[i]])["attention_mask"].shape[1] for i in range(len(rows))]
        assert collator.lengths(rows) == alone and len(set(alone)) > 1


@pytest.mark.parametrize("command", ["finetune", "distill"])
def test_batches_of_like_lengths_are_padded_less(folder, checkpoint, tmp_path, monkeypatch, command):
    collate, batches = SentenceCollator.__call__, []

    def collated(self, rows):
        batch = collate(self, rows)
        batches.append(batch["attention_mask"])
        return batch

    monkeypatch.setattr(SentenceCollator, "__call__", collated)
    padding = {}
    for sampling in ("random", "group_by_length"):
        training = {
            "num_train_epochs": 1, "per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True,
            "train_sampling_strategy": sampling, "save_strategy": "no",
        }  # fmt: skip
        data = Data(str(folder), sentence="sentence", label="label", validation="none", test="none")
        teacher = {"finetune": str(tmp_path / sampling), "distill": str(checkpoint)}[command]
        source = {"finetune": str(checkpoint), "distill": None}[command]
        made = Recipe(
            "text_classification", data=data, model=Model(source, teacher), output=str(tmp_path / f"{sampling}_out"),
            conversion=Conversion("linformer", options={"r": 4}), finetune=training, distill=training,
        )  # fmt: skip
        run = getattr(pipeline, command)(made)
        batches.clear()
        run.execute()
        rows = sorted(run.trainer.data_collator.lengths(run.splits.train))
        assert sorted(length for batch in batches for length in batch.sum(-1).tolist()) == rows
        padding[sampling] = sum(int((batch == 0).sum()) for batch in batches)
    assert padding["group_by_length"] < 0.6 * padding["random"]


def test_finetune_distill_and_eval(folder, checkpoint, tmp_path, capsys):
    training = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    recipe = {
        "task": "text_classification",
        "data": {"path": str(folder), "sentence": "sentence", "label": "label", "validation": "none", "test": "dev"},
        "model": {"source": str(checkpoint), "teacher": str(tmp_path / "teacher")},
        "output": str(tmp_path / "student"),
        "conversion": {"mixer": "linformer", "options": {"r": 4}},
        "finetune": training,
        "distill": {**training, "layer_norm": False, "include_embeddings": True, "layer_reduction": "sum"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["finetune", str(path)]) == 0 and main(["distill", str(path)]) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "student"), str(path), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["rows"] == 8 and 0 <= scores["test_accuracy"] <= 1


def test_classes_that_a_checkpoint_only_counts_are_named_by_the_data(folder, checkpoint, tmp_path):
    data = {"path": str(folder), "sentence": "sentence", "label": "label", "validation": "none", "test": "dev"}
    distill = {"max_steps": 1, "use_cpu": True, "disable_tqdm": True}
    recipe = Recipe("text_classification", data=Data(**data), model=Model(teacher=str(checkpoint)), distill=distill)
    recipe = replace(recipe, output=str(tmp_path), conversion=Conversion("linformer", options={"r": 4}))
    with pytest.warns(UserWarning, match="model.teacher: its classes have no names; .* LABEL_0 for '0' and so on"):
        run = pipeline.distill(recipe)
    assert run.trainer.model.config.id2label == {0: "0", 1: "1"} and run.splits.labels == ["0", "1"]

    def named(classes, **changes):
        train = Sentences([("a",), ("b",)], ["no", "yes"], classes)
        config = BertConfig(**changes)
        pipeline.models.name_classes(config, Splits(train, None, None, classes or ["no", "yes"]), "checkpoint")
        return list(config.label2id)

    with pytest.warns(UserWarning, match="checkpoint: its classes have no names"):
        assert named(["yes", "no"]) == ["yes", "no"]
    assert named(None) == named(["yes", "no", "maybe"]) == ["LABEL_0", "LABEL_1"]  # in what order, nobody knows
    assert named(["yes", "no"], id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1}) == ["bad", "good"]


def test_a_data_set_of_the_hub_as_glue_is(tmp_path):
    """Classes by number, the test's answers kept back as -1, pairs, and a configuration with its own name."""
    datasets = pytest.importorskip("datasets")
    import pyarrow.parquet

    from linconv.data import sentences

    names = ["entailment", "not_entailment"]
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=names),
        }
    )
    for split, labels in (("train", [0, 1, 0, 1]), ("validation", [1, 0]), ("test", [-1, -1])):
        rows = {
            "question": [f"{split} {i}?" for i in range(len(labels))],
            "sentence": [f"Answer {i}." for i in range(len(labels))],
            "label": labels,
        }
        (tmp_path / "qnli").mkdir(exist_ok=True)
        table = pyarrow.Table.from_pydict(rows, schema=features.arrow_schema)
        pyarrow.parquet.write_table(table, tmp_path / "qnli" / f"{split}-00000-of-00001.parquet")

    def load(columns, **changes):
        return sentences._from_hub(Data(path=str(tmp_path / "qnli"), **changes), "data.sentence", columns, "label")

    got = load(["question", "sentence"])
    assert got["test"] is None
    assert got["train"].texts == [(f"train {i}?", f"Answer {i}.") for i in range(4)]
    assert got["train"].targets == ["entailment", "not_entailment"] * 2 and got["validation"].targets == names[::-1]
    assert got["train"].classes == got["train"].subset([0]).classes == names
    with pytest.raises(UserError, match=r"data\.train: no 'trian'; did you mean 'train'"):
        load(["sentence"], train="trian")
    with pytest.raises(UserError, match=r"data\.sentence: no 'sentance'; did you mean 'sentence'"):
        load(["sentance"])


def test_rows_of_the_hub_without_a_value_are_named(tmp_path):
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    from linconv.data import sentences

    rows = {"text": ["a", None, "c", None], "label": ["x", "y", "x", "y"], "answer": ["x", "y", "x", None]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "train-00000-of-00001.parquet")
    data = Data(path=str(tmp_path))
    with pytest.raises(UserError, match="data.text: column 'text' of the split train: null in 2 of 4 rows, row 1; "):
        sentences._from_hub(data, "data.text", ["text"], None)
    with pytest.raises(
        UserError, match="data.label: column 'answer' of .* null in 1 of 4 rows, row 3 .from 0 on.; want"
    ):
        sentences._from_hub(data, "data.sentence", ["label"], "answer")
    assert len(sentences._from_hub(data, "data.sentence", ["label"], "label")["train"]) == 4
