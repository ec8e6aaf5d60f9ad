import json
import tracemalloc
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from linconv import report
from linconv.cli import main
from linconv.errors import UserError
from linconv.report.figures import curve_figure


def run_folder(root, name, wrong, *, guide=None, seed=0, clips=40, score="test_accuracy", layers=None, **changes):
    """A folder as a run leaves it: the first `wrong` of the clips are mistaken. `changes` go into the recipe's blocks,
    but for `command`, which is that of a fine-tuning where the name is teacher."""
    command = changes.pop("command", "finetune" if name == "teacher" else "distill")
    folder = root / f"seed-{seed}" / name
    folder.mkdir(parents=True)
    value = wrong / clips if score.endswith("wer") else 1 - wrong / clips
    recipe = {
        "task": "ctc" if score.endswith("wer") else "classification",
        "seed": seed,
        "data": {"path": "/data/speech"},
        "model": {"teacher": str(root / f"seed-{seed}" / "teacher")},
        "conversion": {"mixer": "bimamba2"},
        "guide": {"name": "target_guided", "mode": None, "init": None, "checkpoints": None, **(guide or {})},
    }
    for block, entries in changes.items():
        recipe[block] = {**recipe.get(block, {}), **entries}
    results = {
        **({} if command is None else {"command": command}),
        "scores": {score: value, "test_loss": 1.0},
        "clips": [[int(i < wrong), 1] for i in range(clips)],
        "parameters": 1000,
        "recipe": recipe,
    }
    (folder / "results.json").write_text(json.dumps(results))
    if layers is not None:
        records = [
            {"step": s, "loss": 1.0, "layer_mse": [1 / s] * layers, "layer_cosine": [0.5] * layers} for s in (1, 2)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_rows_are_means_over_seeds_beside_their_teachers(tmp_path):
    folders = []
    for seed, (teacher, student) in enumerate([(4, 8), (8, 10)]):
        folders.append(run_folder(tmp_path, "teacher", teacher, seed=seed))
        folders.append(run_folder(tmp_path, "guided", student, seed=seed, guide={"init": "source"}, layers=2))
    made = report.build(folders)
    teacher, student = made["rows"]
    assert teacher["mode"] == "teacher" and "retained" not in teacher
    assert student["mode"] == "target-guided (init source)" and student["seeds"] == [0, 1]
    assert student["score"] == pytest.approx((32 + 30) / 80) and teacher["score"] == pytest.approx((36 + 32) / 80)
    assert student["difference"] == pytest.approx(-6 / 80)
    assert student["retained"] == pytest.approx((32 / 36 + 30 / 32) / 2)
    low, high = student["difference_interval"]
    assert low < -6 / 80 < high <= 0  # on no clip is the student right where its teacher is wrong
    assert [c["layer_mse"] for c in made["curves"]] == [[[1.0, 1.0], [0.5, 0.5]]] * 2


def test_of_a_teacher_that_gets_nothing_right_nothing_is_retained(tmp_path):
    folders = [run_folder(tmp_path, "teacher", 4, clips=4), run_folder(tmp_path, "guided", 2, clips=4)]
    made = report.build(folders)
    assert made["rows"][1]["retained"] is made["rows"][1]["retained_interval"] is None
    assert report.table(made)[1][1][-2] == "-" and "NaN" not in json.dumps(made)


def test_draws_in_which_the_teacher_gets_nothing_right_do_not_count(tmp_path):
    folders = [run_folder(tmp_path, "teacher", 3, clips=4), run_folder(tmp_path, "guided", 2, clips=4)]
    student = report.build(folders)["rows"][1]
    assert student["retained"] == 2 and 0 <= student["retained_interval"][0] < student["retained_interval"][1] <= 4


@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl", "config.json", "probe.safetensors"])
@pytest.mark.parametrize("text", ["{}", '{"scores": ', "[1]"])
def test_files_that_no_run_leaves_are_named(tmp_path, name, text):
    folder = run_folder(tmp_path, "guided", 4, command=None)
    (folder / name).write_text(text)
    if (name, text) in (("metrics.jsonl", "{}"), ("metrics.jsonl", "[1]"), ("config.json", "{}")):
        assert report.build([folder])["rows"]  # a record of no loss, and a config of no conversion
    else:
        with pytest.raises(UserError, match=f"RUN: {folder} has missing, incomplete or foreign files"):
            report.build([folder])


def test_the_interval_covers_what_resampling_would_give(tmp_path):
    folder = run_folder(tmp_path, "teacher", 100, clips=400)
    low, high = report.build([folder])["rows"][0]["interval"]
    deviation = np.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - 1.96 * deviation, abs=0.004)
    assert high == pytest.approx(0.75 + 1.96 * deviation, abs=0.004)


def test_resampling_takes_bounded_memory_and_gives_what_all_at_once_does(tmp_path, monkeypatch):
    folder = run_folder(tmp_path, "teacher", 0)
    clips, results = np.random.default_rng(3).random((2500, 2)), json.loads((folder / "results.json").read_text())
    results.update(clips=clips.tolist(), scores={"test_perplexity": 1.0})
    (folder / "results.json").write_text(json.dumps(results))
    monkeypatch.setattr(report.statistics, "RESAMPLES", 2001)
    tracemalloc.start()
    interval = report.build([folder])["rows"][0]["interval"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # the draws alone are 40 MB, what they draw is 80 MB
    drawn = clips[np.random.default_rng(0).integers(0, 2500, (2001, 2500))]
    scores = report.statistics.score_of(drawn, report.runs.MEASURES["perplexity"])
    assert interval == [float(q) for q in np.quantile(scores, [0.025, 0.975])]


def test_error_rates_count_words_and_the_lowest_is_best(tmp_path):
    folders = [run_folder(tmp_path, name, wrong, score="test_wer") for name, wrong in (("teacher", 10), ("guided", 20))]
    folders.append(run_folder(tmp_path, "other", 12, score="test_wer", guide={"name": "unguided"}))
    rows = report.build(folders)["rows"]
    assert [row["mode"] for row in rows] == ["teacher", "unguided", "target-guided"]
    assert rows[2]["retained"] == pytest.approx(0.5 / 0.75)


def test_perplexity_is_the_exponential_of_the_mean_and_the_lowest_is_best(tmp_path):
    folders = []
    for name, nats in (("guided", [4.0, 2.0, 3.0]), ("teacher", [2.0, 1.0, 3.0])):
        folders.append(run_folder(tmp_path, name, 0, clips=3))
        results = json.loads((folders[-1] / "results.json").read_text())
        results["clips"] = [[n, tokens] for n, tokens in zip(nats, (2, 2, 1))]
        results["scores"] = {"test_loss": 1.0, "test_perplexity": float(np.exp(sum(nats) / 5))}
        results["recipe"]["task"] = "language_modeling"
        (folders[-1] / "results.json").write_text(json.dumps(results))
    made = report.build(folders)
    teacher, student = made["rows"]
    assert (teacher["mode"], student["mode"], made["lower_is_better"]) == ("teacher", "target-guided", True)
    assert teacher["score"] == pytest.approx(np.exp(6 / 5)) and student["score"] == pytest.approx(np.exp(9 / 5))
    # What it gives to a right token, in the geometric mean, of what its teacher does.
    assert student["retained"] == pytest.approx(np.exp(-3 / 5))
    low, high = student["interval"]
    assert low == pytest.approx(np.exp(1)) and high == pytest.approx(np.exp(3))  # all draws of one block or another
    assert made["model_card"]["pipeline_tag"] == "text-generation"
    assert made["model_card"]["model-index"][0]["results"][0]["metrics"][0]["type"] == "perplexity"
    line = report.table(made)[1][1]
    assert line[2] == "6.05 [2.72, 20.09]" and line[3].startswith("+2.73 [") and "points" not in line[3]
    assert report.write(made, tmp_path / "out").is_file()


def test_trajectories_share_one_projection_and_the_shift_is_a_cosine_distance(tmp_path):
    teacher, student = run_folder(tmp_path, "teacher", 4), run_folder(tmp_path, "guided", 8)
    # Two clips, one layer, in a plane of a space of five dimensions.
    plane = torch.linalg.qr(torch.randn(5, 2))[0]

    def at(x, y):
        return (plane @ torch.tensor([float(x), float(y)])).expand(2, 1, 5).contiguous()

    save_file({"student/0": at(1, 0), "student/10": at(1, 1)}, teacher / "probe.safetensors")
    probe = {"student/0": at(4, 4), "student/9": at(2, 2), "student/10": at(1, 1), "teacher/0": at(1, 1)}
    save_file(probe, student / "probe.safetensors")
    made = report.build([teacher, student])
    paths = {path["name"]: path for path in made["trajectories"]}
    assert list(paths) == ["teacher", "target-guided", "teacher of target-guided"]
    assert paths["target-guided"]["steps"] == [0, 9, 10]
    assert paths["teacher"]["variance_shown"] == pytest.approx(1.0, abs=1e-6)
    ends = [np.asarray(path["points"][-1]) for path in paths.values()]
    assert np.allclose(ends[0], ends[1], atol=1e-5) and np.allclose(ends[1], ends[2], atol=1e-5)
    way = np.linalg.norm(np.diff(paths["target-guided"]["points"], axis=0), axis=1)
    assert way == pytest.approx([8**0.5, 2**0.5], rel=1e-4)
    (shift,) = made["feature_shift"]
    assert shift["layers"] == pytest.approx([1 - 0.5**0.5], rel=1e-4)
    assert "below 0.3" in shift["advice"] and "try the target" in shift["advice"]
    assert report.write(made, tmp_path / "out").read_text().count("data:image/png;base64,") == 3


def test_each_mode_has_a_path_and_curves_whatever_its_seeds(tmp_path):
    teacher = run_folder(tmp_path, "teacher", 4)
    folders = [teacher, *(run_folder(tmp_path, f"guided-{s}", 8, seed=s, layers=2) for s in (2, 1))]
    folders.append(run_folder(tmp_path, "hybrid", 8, seed=3, layers=2, guide={"drop_kd_at": 5}))
    for scale, folder in enumerate(folders, 1):
        save_file(
            {"student/0": torch.ones(2, 1, 4), "student/10": torch.ones(2, 1, 4) * scale}, folder / "probe.safetensors"
        )
    made = report.build(folders)
    paths = {path["name"]: np.diff(path["points"], axis=0) for path in made["trajectories"]}
    assert list(paths) == ["teacher", "target-guided", "target-guided (drop_kd_at 5)"]
    assert np.linalg.norm(paths["target-guided"]) == pytest.approx(4)  # from 1 to 3 in each of four dimensions: seed 1
    with mock.patch("matplotlib.axes.Axes.set_title") as titled:
        curve_figure(made)
    assert [call.args[0] for call in titled.call_args_list] == ["target-guided", "target-guided\n(drop_kd_at 5)"]


@pytest.mark.parametrize("embeddings, labels", [(False, ["layer 1", "layer 2"]), (True, ["embeddings", "layer 1"])])
def test_curves_are_named_after_their_layers(tmp_path, embeddings, labels):
    made = report.build([run_folder(tmp_path, "a", 8, layers=2, distill={"include_embeddings": embeddings})])
    with mock.patch("matplotlib.axes.Axes.plot") as plotted:
        curve_figure(made)
    assert [call.kwargs["label"] for call in plotted.call_args_list] == 2 * labels


def test_command_writes_three_files(tmp_path, capsys):
    folders = [run_folder(tmp_path, "teacher", 4), run_folder(tmp_path, "a<b>", 8, layers=3)]
    assert main(["report", *map(str, folders), "--output", str(tmp_path / "out")]) == 0
    assert "target-guided" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page.replace("http-equiv", "")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rows"][1]["retained"] == pytest.approx(32 / 36)
    assert "| target-guided | 1 | 80.0%" in (tmp_path / "out" / "report.md").read_text()


def test_what_is_no_run_is_named(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "no results.json" in capsys.readouterr().err
    mixed = [run_folder(tmp_path, "teacher", 1), run_folder(tmp_path, "x", 1, score="test_wer")]
    with pytest.raises(UserError, match="scores of different kinds"):
        report.build(mixed)


def test_seeds_are_drawn_too(tmp_path):
    """Runs without a mistake but for one whole seed: no draw of clips changes the score, a draw of seeds does."""
    folders = [run_folder(tmp_path, "teacher", wrong, seed=seed) for seed, wrong in enumerate([0, 0, 40])]
    low, high = report.build(folders)["rows"][0]["interval"]
    assert low == 0 and high == 1


def test_what_runs_share_is_told_once_and_paths_start_where_they_part(tmp_path):
    folders = [run_folder(tmp_path, "teacher", 1), run_folder(tmp_path, "guided", 2, guide={"init": "source"})]
    for day, folder in enumerate(folders, start=1):
        results = json.loads((folder / "results.json").read_text())
        results["recipe"]["distill"] = {"learning_rate": 1e-3 * day, "max_steps": 5}
        results["provenance"] = {"date": f"2026-01-0{day}", "torch": "2.13.0"}
        (folder / "results.json").write_text(json.dumps(results))
    made = report.build(folders, title="Two runs")
    assert made["title"] == "Two runs" and [run["path"] for run in made["runs"]] == ["teacher", "guided"]
    assert made["recipe"]["distill"] == {"learning_rate": [0.001, 0.002], "max_steps": 5}
    assert made["provenance"] == {"date": ["2026-01-01", "2026-01-02"], "torch": "2.13.0"}
    assert "torch 2.13.0" in report.write(made, tmp_path / "out").read_text()


def test_text_runs_have_a_model_card(tmp_path):
    folder = run_folder(tmp_path, "teacher", 1)
    results = json.loads((folder / "results.json").read_text())
    results["recipe"]["task"] = "text_classification"
    (folder / "results.json").write_text(json.dumps(results))
    assert report.build([folder])["model_card"]["pipeline_tag"] == "text-classification"


def modes(*folders):
    return [row["mode"] for row in report.build(folders)["rows"]]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ([{}, {"conversion": {"mixer": "hydra"}}], ["bimamba2", "hydra"]),
        (
            [{"conversion": {"mixer": "hydra"}}, {"conversion": {"mixer": "linformer", "options": {"r": 64}}}],
            ["hydra", "linformer, r=64"],
        ),
        ([{"conversion": {"options": {"d_state": n}}} for n in (16, 32)], ["d_state=16", "d_state=32"]),
        ([{"conversion": {"layers": n}} for n in (None, [0, 1], [])], ["all layers", "layers 0,1", "no layers"]),
        ([{"distill": {"alpha_ld": n}} for n in (15.0, 0.0)], ["alpha_ld 15", "alpha_ld 0"]),
        ([{}, {"distill": {"alpha_ld": 0.0}}], ["alpha_ld 15", "alpha_ld 0"]),
        ([{"distill": {"learning_rate": n}} for n in (1e-3, 2e-4)], ["learning_rate 0.001", "learning_rate 0.0002"]),
        ([{"model": {"overrides": {"layerdrop": n}}} for n in (0.1, 0.0)], ["layerdrop 0.1", "layerdrop 0"]),
        ([{"data": {"limit": {"train": n}}} for n in (100, 200)], ["data.limit.train 100", "data.limit.train 200"]),
        ([{"distill": {"teacher_cache": f}} for f in ("a", None)], ["teacher_cache given", "target-guided"]),
        (
            [{"distill": {"load_best_model_at_end": True, "eval_steps": n}} for n in (5, 10)],
            ["eval_steps 5", "eval_steps 10"],
        ),
        (
            [{"guide": {"name": "unguided"}}, {"conversion": {"mixer": "hydra"}}],
            ["unguided, bimamba2", "target-guided, hydra"],
        ),
    ],
)
def test_runs_of_other_recipes_are_other_rows_named_by_what_differs(tmp_path, changes, named):
    folders = [run_folder(tmp_path, "teacher", 1)]
    for i, change in enumerate(changes):
        folders.append(run_folder(tmp_path, f"student-{i}", 2 + i, **change))
    assert modes(*folders) == ["teacher", *named]


def test_runs_that_differ_in_what_is_written_or_in_defaults_said_aloud_are_one_row(tmp_path):
    changes = [
        {},
        {"data": {"path": "/elsewhere"}, "distill": {"logging_steps": 5, "save_strategy": "no", "eval_steps": 10}},
        {"model": {"waypoints": 6}, "distill": {"alpha_ld": 15, "teacher_cache": None}, "finetune": {"max_steps": 9}},
        {"data": {"limit": {}, "normalize_text": True}, "conversion": {"options": {"d_state": 128}, "layers": None}},
        {"guide": {"checkpoints": "/waypoints"}},
    ]
    folders = [run_folder(tmp_path, "x", 1, seed=seed, **change) for seed, change in enumerate(changes)]
    (row,) = report.build(folders)["rows"]
    assert row["mode"] == "target-guided" and row["seeds"] == [0, 1, 2, 3, 4]


def test_teachers_of_other_recipes_are_other_rows_and_so_are_their_students(tmp_path):
    folders = []
    for rate in (1e-3, 1e-4):
        root = tmp_path / str(rate)
        folders.append(run_folder(root, "teacher", 1, finetune={"learning_rate": rate}, distill={"alpha_ld": rate}))
        folders.append(run_folder(root, "guided", 2))
    teachers = ["teacher (learning_rate 0.001)", "teacher (learning_rate 0.0001)"]
    assert modes(*folders) == [*teachers, *(f"of {teacher}" for teacher in teachers)]


def test_a_run_is_given_once_and_a_seed_is_one_run(tmp_path, capsys):
    first, other = run_folder(tmp_path, "a", 1), run_folder(tmp_path, "b", 2)
    assert main(["report", str(first), str(first / ".." / "a")]) == 2
    assert "want each run once" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"seed-0/a and .*seed-0/b are both target-guided with seed 0"):
        report.build([first, other])


def test_students_of_one_seed_are_two_draws_where_their_teachers_are(tmp_path):
    folders = [run_folder(tmp_path, "teacher", 1, seed=seed) for seed in (0, 1)]
    teachers = [{"teacher": str(folder)} for folder in folders]
    folders += [run_folder(tmp_path, f"of-{i}", 2 + i, model=teacher) for i, teacher in enumerate(teachers)]
    row = report.build(folders)["rows"][1]
    assert row["seeds"] == [0, 0] and row["difference"] == pytest.approx(-1.5 / 40)


@pytest.mark.parametrize("score", ["test_accuracy", "test_wer"])
def test_rows_are_of_the_same_clips(tmp_path, score):
    folders = [run_folder(tmp_path, "x", 1, seed=seed, clips=clips, score=score) for seed, clips in ((0, 40), (1, 30))]
    with pytest.raises(UserError, match=r"seed-0/x and .*seed-1/x were scored on different clips, 40 and 30"):
        report.build(folders)
    teacher = run_folder(tmp_path, "teacher", 1, seed=1, clips=40, score=score)
    with pytest.raises(UserError, match=r"seed-1/x and .*seed-1/teacher were scored on different clips, 30 and 40"):
        report.build([folders[1], teacher])


def test_clips_of_other_words_are_other_clips(tmp_path):
    folders = [run_folder(tmp_path, "x", 1, seed=seed, score="test_wer") for seed in (0, 1)]
    results = json.loads((folders[1] / "results.json").read_text())
    results["clips"][-1][1] = 7
    (folders[1] / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="different clips"):
        report.build(folders)


def test_a_student_may_have_its_teachers_name(tmp_path):
    teacher = run_folder(tmp_path / "teachers", "roberta", 1, command="finetune")
    student = run_folder(tmp_path / "students", "roberta", 2, model={"teacher": str(teacher)})
    rows = report.build([teacher, student])["rows"]
    assert [row["mode"] for row in rows] == ["teacher", "target-guided"] and "retained" in rows[1]


def leave(folder, linconv=..., record=None, probe=()):
    """What else tells a student from a teacher: the model's config, the log, hidden states."""
    if linconv is not ...:
        (folder / "config.json").write_text(json.dumps({"linconv": linconv} if linconv else {}))
    if record is not None:
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, **record}) + "\n")
    if probe:
        save_file({name: torch.ones(2, 1, 5) for name in probe}, folder / "probe.safetensors")


@pytest.mark.parametrize(
    ("of_teacher", "of_student"),
    [
        ({"linconv": None}, {"linconv": {"layers": [0]}}),
        ({"linconv": {"layers": []}}, {"linconv": {"layers": [0]}}),  # a teacher of Whisper
        (
            {"linconv": {"layers": [0]}, "record": {}},
            {"linconv": {"layers": []}, "record": {"layer_mse": [1.0], "layer_cosine": [1.0]}},
        ),
        ({"probe": ["student/0"]}, {"probe": ["student/0", "teacher/0"]}),
    ],
)
def test_runs_of_earlier_versions_are_told_by_what_they_left_wherever_they_are(tmp_path, of_teacher, of_student):
    teacher = run_folder(tmp_path, "teacher", 1, command=None)
    student = run_folder(tmp_path / "students", "teacher", 2, command=None, model={"teacher": str(teacher)})
    leave(teacher, **of_teacher)
    leave(student, **of_student)
    moved = [folder.rename(tmp_path / f"moved-{i}") for i, folder in enumerate((teacher, student))]
    rows = report.build(moved)["rows"]
    assert [row["mode"] for row in rows] == ["teacher", "target-guided"] and "retained" in rows[1]


def test_with_results_alone_a_teacher_is_told_by_its_place(tmp_path):
    teacher = run_folder(tmp_path, "teacher", 1, command=None)
    student = run_folder(tmp_path / "students", "teacher", 2, command=None, model={"teacher": str(teacher)})
    assert modes(teacher, student) == ["teacher", "target-guided"]


def test_one_teacher_has_students_of_every_seed(tmp_path):
    teacher = run_folder(tmp_path, "teacher", 4)
    folders = [run_folder(tmp_path, "x", 8, seed=seed, model={"teacher": str(teacher)}) for seed in (0, 1, 2)]
    row = report.build([teacher, *folders])["rows"][1]
    assert row["seeds"] == [0, 1, 2] and row["retained"] == pytest.approx(32 / 36)
    assert row["difference"] == pytest.approx(-4 / 40)


def test_teachers_that_were_in_one_folder_are_told_by_the_seed(tmp_path):
    place, folders = {"teacher": "runs/teacher"}, []
    for seed, wrong in enumerate((4, 8)):
        folders.append(run_folder(tmp_path, "teacher", wrong, seed=seed, model=place))
        folders.append(run_folder(tmp_path, "x", 10, seed=seed, model=place))
    row = report.build(folders)["rows"][1]
    assert row["difference"] == pytest.approx(-(6 + 2) / 2 / 40)
    folders.append(run_folder(tmp_path, "x", 10, seed=2, model=place))  # of which of the two nobody knows
    assert "difference" not in report.build(folders)["rows"][1]


def test_a_student_is_of_the_teacher_where_its_recipe_says(tmp_path):
    """Of a folder that was moved before the student was trained, too."""
    teacher = run_folder(tmp_path, "teacher", 4).rename(tmp_path / "kept")
    student = run_folder(tmp_path, "x", 8, seed=1, model={"teacher": str(teacher)})
    assert report.build([teacher, student])["rows"][1]["retained"] == pytest.approx(32 / 36)


def test_a_model_card_names_the_students_mixers(tmp_path):
    folders = [run_folder(tmp_path, "teacher", 1)]
    folders += [run_folder(tmp_path, name, 2, conversion={"mixer": name}) for name in ("hydra", "linformer")]
    assert report.build(folders)["model_card"]["tags"] == ["linconv", "hydra", "linformer"]


def test_feature_shifts_name_their_teacher_where_there_are_several(tmp_path):
    folders = []
    for rate in (1e-3, 1e-4):
        folders.append(run_folder(tmp_path / str(rate), "teacher", 1, finetune={"learning_rate": rate}))
        save_file({f"student/{step}": torch.ones(2, 1, 5) for step in (0, 1)}, folders[-1] / "probe.safetensors")
    report.write(report.build(folders), tmp_path / "out")
    assert "- teacher (learning_rate 0.001), seed 0: mean" in (tmp_path / "out" / "report.md").read_text()
    assert "Teacher (learning_rate 0.001), seed 0: mean" in (tmp_path / "out" / "report.html").read_text()
