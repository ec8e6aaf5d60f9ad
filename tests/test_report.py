import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from linconv import report
from linconv.cli import main
from linconv.errors import UserError


def run_folder(root, name, wrong, *, guide=None, seed=0, clips=40, score="test_accuracy", layers=None):
    """A folder as a run leaves it: the first `wrong` of the clips are mistaken."""
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
    results = {
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


def test_the_interval_covers_what_resampling_would_give(tmp_path):
    folder = run_folder(tmp_path, "teacher", 100, clips=400)
    low, high = report.build([folder])["rows"][0]["interval"]
    deviation = np.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - 1.96 * deviation, abs=0.004)
    assert high == pytest.approx(0.75 + 1.96 * deviation, abs=0.004)


def test_error_rates_count_words_and_the_lowest_is_best(tmp_path):
    folders = [run_folder(tmp_path, name, wrong, score="test_wer") for name, wrong in (("teacher", 10), ("guided", 20))]
    folders.append(run_folder(tmp_path, "other", 12, score="test_wer", guide={"name": "unguided"}))
    rows = report.build(folders)["rows"]
    assert [row["mode"] for row in rows] == ["teacher", "unguided", "target-guided"]
    assert rows[2]["retained"] == pytest.approx(0.5 / 0.75)


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
