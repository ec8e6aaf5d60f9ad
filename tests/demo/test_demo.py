"""The demo from end to end, on noise and for a few steps: every part runs, and the report tells what was found."""

import re

import pytest

from linconv import pipeline
from linconv.demo import _parser, main
from linconv.demo.fetch import write_audio_folder
from linconv.demo.run import RECIPE
from linconv.recipe import load_recipe

from .test_fetch import recordings

SHORT = {"max_steps": 3, "warmup_steps": 0}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_audio_folder(folder / "speech", recordings(), clips={"train": 10, "validation": 2, "test": 5})
    out = folder / "out"
    arguments = ["--data", str(folder / "speech"), "--out", str(out), "--steps", "3", "--lengths", "1,2"]
    assert main(arguments) == 0
    return out


def test_report_has_every_row_and_says_that_the_reload_was_exact(demo):
    report = (demo / "report.md").read_text()
    for name in ("teacher", "unguided", "target-guided", "hybrid"):
        assert re.search(rf"^\| {name} \| \d+\.\d% \| 3 \| [\d,]+ \|", report, re.M), name
    assert "bit for bit" in report and "bug" not in report
    for seconds in (1, 2):
        assert re.search(rf"^\| {seconds} s \| ~?[\d,.]+ m?s \| ~?[\d,.]+ m?s \| [\d.]+× \|", report, re.M)
    assert "Crossover" in report or "faster" in report
    assert (demo / "report.png").read_bytes().startswith(b"\x89PNG")


def test_students_have_more_parameters_than_the_teacher_and_equal_ones_among_them(demo):
    rows = re.findall(
        r"^\| (?:teacher|unguided|target-guided|hybrid) \| .*? \| 3 \| ([\d,]+)", (demo / "report.md").read_text(), re.M
    )
    teacher, *students = (int(row.replace(",", "")) for row in rows)
    assert len(students) == 3 and len(set(students)) == 1 and students[0] > teacher


def test_same_seed_same_weights(demo, tmp_path):
    settings = [
        ("data.path", str(demo.parent / "speech")),
        ("model.teacher", str(tmp_path / "teacher")),
        ("output", str(tmp_path / "hybrid")),
        ("guide.name", "hybrid"),
        ("guide.drop_layer_loss_at", 2),
        *((f"{block}.{key}", value) for block in ("finetune", "distill") for key, value in SHORT.items()),
    ]
    for command, name in ((pipeline.finetune, "teacher"), (pipeline.distill, "hybrid")):
        command(load_recipe(RECIPE, settings)).execute()
        first, second = ((out / name / "model.safetensors").read_bytes() for out in (demo, tmp_path))
        assert first == second, name


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lengths", "0"], "argument --lengths: got '0'; want seconds from 0.1 up, as 5,10,30"),
        (["--lengths", "5,nan,10"], "argument --lengths: got '5,nan,10'; want"),
        (["--lengths", "5;10"], "argument --lengths: got '5;10'; want"),
        (["--steps", "0"], "argument --steps: got '0'; want a whole number above 0"),
        (["--budget", "-1"], "argument --budget: got '-1'; want a number above 0"),
        (["--lenghts", "5"], "no argument '--lenghts'; did you mean '--lengths'?"),
        (["--data", "no/such/folder"], "--data: no folder 'no/such/folder'"),
        (["--data", "tests", "--out", __file__], f"--out: {__file__} is a file; want a folder"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(argv, message, capsys):
    try:
        status = main(argv)
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr().err.strip()
    assert status == 2 and len(said.splitlines()) == 1 and said.startswith("linconv demo: error: ") and message in said


def test_lengths_are_taken_in_their_order():
    assert _parser().parse_args(["--lengths", "10,5,10,0.5"]).lengths == [0.5, 5, 10]
