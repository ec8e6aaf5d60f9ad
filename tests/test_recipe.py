import math
from pathlib import Path

import pytest

from linconv.errors import UserError
from linconv.recipe import load_recipe

RECIPES = sorted(Path(__file__).parent.parent.glob("recipes/*.yaml"))


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_committed_recipes_are_valid(path):
    from linconv.distillation import DistillationArguments, make_mode

    recipe = load_recipe(path)
    make_mode(recipe.guide.name, **recipe.guide.options())
    for block in (recipe.finetune, recipe.distill):
        DistillationArguments(output_dir="unused", use_cpu=True, **{k: v for k, v in block.items() if k != "bf16"})


def test_there_are_recipes():
    assert RECIPES


def test_values_become_what_their_key_wants(tmp_path):
    recipe = load_recipe(
        write(
            tmp_path,
            """
            task: ctc
            data: {path: x, holdout: {test: 0.2}, max_seconds: 20}
            conversion: {layers: [0, 2]}
            guide: {name: hybrid, drop_layer_loss_at: 30}
            distill: {learning_rate: 3e-4, alpha_ld: 15, layer_weights: [1, 2], eval_strategy: no, bf16: true}
            """,
        ),
        [("seed", 3), ("data.path", "y"), ("distill.max_steps", 7)],
    )
    assert (recipe.task, recipe.seed, recipe.data.path) == ("ctc", 3, "y")
    assert recipe.distill == {
        "learning_rate": 3e-4, "alpha_ld": 15.0, "layer_weights": [1.0, 2.0], "eval_strategy": "no", "bf16": True,
        "max_steps": 7,
    }  # fmt: skip
    assert isinstance(recipe.distill["alpha_ld"], float) and isinstance(recipe.data.max_seconds, float)
    assert recipe.guide.options() == {"drop_layer_loss_at": 30}
    assert load_recipe(None).conversion.mixer == "bimamba2"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("taks", "ctc", "recipe key taks: no 'taks'; did you mean 'task'"),
        ("data.pth", "x", "recipe key data.pth: no 'pth'; did you mean 'path'"),
        ("distill.lerning_rate", 1.0, "did you mean 'learning_rate'"),
        ("finetune.alpha_kdd", 1.0, "did you mean 'alpha_kd'"),
        ("guide.name", "hybird", "guide.name: no 'hybird'; did you mean 'hybrid'"),
        ("distill.lr_scheduler_type", "cosin", "did you mean 'cosine'"),
        ("conversion.layers", 3, "conversion.layers: got 3; want list"),
        ("conversion.layers", [0, "one"], r"conversion.layers\[1\]: got 'one'; want int"),
        ("seed", "x", "seed: got 'x'; want int"),
        ("seed", True, "seed: got True; want int"),
        ("distill.learning_rate", "fast", "distill.learning_rate: got 'fast'; want float"),
        ("distill.learning_rate", math.nan, "distill.learning_rate: got nan; want a finite number"),
        ("distill.learning_rate", "inf", "distill.learning_rate: got 'inf'; want a finite number"),
        ("distill.learning_rate", 10**400, "distill.learning_rate: got 10+; want float"),
        ("distill.exponential_decay_to", -math.inf, "distill.exponential_decay_to: got -inf; want a finite number"),
        ("data.max_seconds", math.nan, "data.max_seconds: got nan; want a finite number"),
        ("distill.max_steps", 1.5, "distill.max_steps: got 1.5; want int"),
        ("distill.bf16", "yes", "distill.bf16: got 'yes'; want bool"),
        ("distill.output_dir", "x", "it is given at the top of the recipe"),
        ("data", "x", "data: got 'x'; want keys: path"),
        ("task.name", 1, "task.name: 'task' holds a value, not keys"),
        ("data.holdout.test", "some", "data.holdout.test: got 'some'; want float"),
        ("output", "a\0b", r"output: got 'a\\x00b'; want text without null characters"),
        ("guide.checkpoints", ["a", "\0"], r"guide.checkpoints\[1\]: got '\\x00'; want text without null characters"),
    ],
)
def test_mistakes_are_named(tmp_path, key, value, message):
    with pytest.raises(UserError, match=message):
        load_recipe(write(tmp_path, "task: ctc"), [(key, value)])


def test_wrong_files_are_named(tmp_path):
    path = write(tmp_path, "task: [")
    with pytest.raises(UserError, match="not YAML"):
        load_recipe(path)
    with pytest.raises(UserError, match="got list at the top"):
        load_recipe(write(tmp_path, "- task"))
    with pytest.raises(UserError, match="did you mean '.*recipe.yaml'"):
        load_recipe(tmp_path / "recpe.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\ntask: ctc\nseed: 2", "found the key 'seed' twice .*line 3"),
        ("distill: {max_steps: 7, learning_rate: 1, max_steps: 8}", "found the key 'max_steps' twice"),
        ("seed: 2026-13-01", "month must be in 1..12"),
        (b"output: caf\xe9", "unacceptable character"),
        (b"output: caf\xc3", "unacceptable character"),
        ("data: " + "[" * 5000 + "]" * 5000, "nested too deep"),
    ],
    ids=["key", "nested key", "date", "Latin-1", "cut off", "depth"],
)
def test_what_is_no_yaml_is_said_so(tmp_path, text, message):
    with pytest.raises(UserError, match=f"recipe.yaml: not YAML: .*{message}"):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_locale_does_not_matter(tmp_path, monkeypatch, encoding):
    monkeypatch.setattr("io.text_encoding", lambda *_: "ascii")  # what Path.read_text would ask
    path = write(tmp_path, "task: ctc\r\nmodel: {source: größe}\r\n".encode(encoding))
    assert load_recipe(path).model.source == "größe"


def test_a_key_goes_over_that_of_a_merged_block(tmp_path):
    text = "finetune: &training {max_steps: 7, learning_rate: 1}\ndistill: {<<: *training, max_steps: 8}"
    assert load_recipe(write(tmp_path, text)).distill == {"max_steps": 8, "learning_rate": 1.0}


def test_a_key_goes_over_one_of_the_blocks_that_are_one_by_an_alias(tmp_path):
    found = load_recipe(
        write(tmp_path, "finetune: &training {max_steps: 7}\ndistill: *training"), [("distill.max_steps", 8)]
    )
    assert (found.finetune["max_steps"], found.distill["max_steps"]) == (7, 8)
