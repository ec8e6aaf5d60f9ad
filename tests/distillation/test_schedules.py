import pytest

from linconv.distillation import Hybrid, TargetGuided, TrajectoryGuided, Unguided, WaypointGuided, make_mode
from linconv.distillation.schedules import Lessons


def test_what_each_mode_teaches_and_starts_from():
    assert Unguided().lessons(0) == Lessons(layers=False, kd=False) and Unguided().origin == "source"
    assert TargetGuided().lessons(10**6) == Lessons(layers=True, kd=True) and TargetGuided().origin == "target"
    assert TargetGuided("source").origin == "source"


def test_hybrid_drops_each_loss_at_its_own_step():
    mode = Hybrid(TargetGuided("source"), drop_layer_loss_at=3, drop_kd_at=5)
    assert mode.origin == "source"
    assert [(mode.lessons(s).layers, mode.lessons(s).kd) for s in range(7)] == [(True, True)] * 3 + [
        (False, True)
    ] * 2 + [(False, False)] * 2
    assert Hybrid(drop_layer_loss_at=0).lessons(0) == Lessons(layers=False, kd=True)
    assert Hybrid(drop_kd_at=1).lessons(9) == Lessons(layers=True, kd=False)


def snapshots(folder, *steps) -> str:
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "model.safetensors").touch()
    return str(folder)


def test_the_waypoint_is_the_first_after_the_step_then_the_last(tmp_path):
    mode = WaypointGuided(snapshots(tmp_path, 200, 1000, 30))
    names = [mode.waypoint(step).rpartition("/")[2] for step in (0, 29, 30, 199, 200, 999, 1000, 5000)]
    assert names == [f"checkpoint-{n}" for n in (30, 30, 200, 200, 1000, 1000, 1000, 1000)]
    assert mode == WaypointGuided(
        [tmp_path / "checkpoint-1000", tmp_path / "checkpoint-30", tmp_path / "checkpoint-200"]
    )
    assert mode.origin == "source" and mode.lessons(7) == Lessons(layers=True, kd=True)


def test_hybrid_wraps_any_mode(tmp_path):
    trajectory = Hybrid(TrajectoryGuided(3), drop_kd_at=2)
    assert trajectory.guide == TrajectoryGuided(3) and trajectory.origin == "source"
    waypoint = make_mode("hybrid", mode="waypoint_guided", checkpoints=snapshots(tmp_path, 5), drop_layer_loss_at=1)
    assert waypoint.guide == WaypointGuided(str(tmp_path))
    assert make_mode("trajectory_guided", update_every=4) == TrajectoryGuided(4)
    assert TargetGuided().guide == TargetGuided()


def test_modes_by_name():
    assert make_mode("unguided") == Unguided()
    assert make_mode("target_guided", init="source") == TargetGuided("source")
    assert make_mode("hybrid", init="source", drop_layer_loss_at=7) == Hybrid(TargetGuided("source"), 7)
    assert make_mode("hybrid", mode="unguided", drop_kd_at=7) == Hybrid(Unguided(), None, 7)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TargetGuided("teacher"), ValueError, "init: got 'teacher'; want one of target, source"),
        (lambda: Hybrid(), ValueError, "drop_layer_loss_at: got None, and drop_kd_at too"),
        (lambda: Hybrid(drop_kd_at=-1), ValueError, "drop_kd_at: got -1"),
        (lambda: Hybrid(drop_layer_loss_at=0.5), ValueError, "drop_layer_loss_at: got 0.5"),
        (lambda: Hybrid(drop_kd_at=True), ValueError, "drop_kd_at: got True"),
        (lambda: Hybrid("target_guided", 3), TypeError, "mode: got str"),
        (lambda: TrajectoryGuided(0), ValueError, "update_every: got 0; want an integer from 1 up"),
        (lambda: WaypointGuided("nowhere"), ValueError, "checkpoints: got 'nowhere', no snapshot"),
        (lambda: WaypointGuided(["best"]), ValueError, "checkpoints: got best; want a name that ends in -STEP"),
        (lambda: WaypointGuided(["checkpoint-3"]), ValueError, "checkpoints: no model.safetensors in checkpoint-3"),
        (lambda: WaypointGuided(300), TypeError, "checkpoints: got 300; want a folder, or folders such as"),
        (lambda: WaypointGuided([300]), TypeError, r"checkpoints: got \[300\]; want a folder, or folders such as"),
        (lambda: make_mode(None), ValueError, "mode: got None; want one of unguided, target_guided"),
        (lambda: make_mode("hybrid", mode=TargetGuided(), drop_kd_at=1), ValueError, "mode: got TargetGuided"),
        (lambda: make_mode("hybird"), ValueError, "did you mean 'hybrid'"),
        (lambda: make_mode("unguided", init="target"), ValueError, "init: not an option of the mode 'unguided'"),
        (lambda: make_mode("target_guided", drop_kd_at=1), ValueError, "drop_kd_at: not an option"),
    ],
)
def test_wrong_options_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
