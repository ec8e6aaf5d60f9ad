"""Whole runs in processes of their own: killed and resumed, and spread over two processes."""

import json
import random
import shutil
import socket
import sys
from multiprocessing import connection
from pathlib import Path

import processes
import pytest
import torch

from . import run as script


@pytest.fixture(scope="module", autouse=True)
def imported_once():
    with processes.importing(script.__name__):
        yield


def run(folder, *options):
    """run.py in a process of its own: its return code and its standard error."""
    (process,) = _run([(folder, options, {})])
    return process


def run_spread(folder, *options):
    """run.py in two processes, with what torchrun would tell them. Where one fails the other is ended, as there."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        group["MASTER_PORT"] = str(found.getsockname()[1])
    both = _run([(folder, options, {**group, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")])
    failed = [process for process in both if process.returncode > 0] or [p for p in both if p.returncode]
    return (failed or both)[0]


def _run(calls):
    """run.py in a process for each of (folder, options, what its environment has besides), at once."""
    logs = [Path(folder).with_suffix(f".{i}.log") for i, (folder, _, _) in enumerate(calls)]
    started = [
        processes.start(log, environment, _main, [str(folder), *options])
        for (folder, options, environment), log in zip(calls, logs)
    ]
    running = {process.sentinel: process for process in started}
    while running:
        codes = [running.pop(sentinel).exitcode for sentinel in connection.wait(running, timeout=300)]
        if not codes or any(codes):
            for process in running.values():
                process.kill()
    return [processes.finished(process, log) for process, log in zip(started, logs)]


def _main(options):
    sys.argv[1:] = options
    script.main()


def steps(folder) -> list[dict]:
    """The training records: what was logged at each step, less the clock."""
    records = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "loss" in record]


def assert_done(process):
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.mark.parametrize("mode", ["hybrid", "unguided", "target", "trajectory", "waypoint", "hybrid-trajectory"])
def test_resumed_after_a_kill_the_losses_are_the_same_bit_for_bit(tmp_path, mode):
    assert_same_after_a_kill(tmp_path, "--augment", "--mode", mode)


def test_resumed_with_a_cache_of_activations_the_losses_are_the_same(tmp_path):
    assert_same_after_a_kill(tmp_path, "--mode", "target", cached=True)


def test_resumed_in_a_later_epoch_batches_of_like_lengths_are_the_same(tmp_path):
    # An epoch has 12 steps, the checkpoint before the kill is of step 15.
    assert_same_after_a_kill(tmp_path, "--augment", "--by-length", "--batch", "2", last=18, kill_at=17)


def assert_same_after_a_kill(tmp_path, *options, cached=False, last=8, kill_at=None):
    """A run killed at a step, any after its first checkpoint if none is given, and one that was not.

    Checkpoints are 3 steps apart, an epoch has 6 steps of batches of 4, and Hybrid changes at step 5.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def given(folder):
        return (*options, "--cache", str(folder / "cache")) if cached else options

    kill_at = kill_at or random.randrange(4, last + 1)
    print("killed at step", kill_at)
    options = (*options, "--steps", str(last))
    assert_done(run(whole, *given(whole)))
    assert run(broken, *given(broken), "--kill-at", str(kill_at)).returncode == -9
    assert [r["step"] for r in steps(broken)] == list(range(1, kill_at))
    assert_done(run(broken, *given(broken), "--resume"))
    assert [r["step"] for r in steps(broken)] == list(range(1, last + 1))
    assert steps(broken) == steps(whole)
    weights = [torch.load(folder / "student.pt") for folder in (whole, broken)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("mode", ["hybrid", "trajectory"])
def test_two_processes_give_the_result_of_one(tmp_path, mode):
    one, two = tmp_path / "one", tmp_path / "two"
    assert_done(run(one, "--batch", "4", "--mode", mode))
    assert_done(run_spread(two, "--batch", "2", "--mode", mode))
    for a, b in zip(steps(one), steps(two), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-6), (a["step"], name)
    weights = [torch.load(folder / "student.pt") for folder in (one, two)]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [("trajectory", "--by-length"), ("waypoint",)], ids=["trajectory", "waypoint"])
def test_two_processes_resume_with_the_same_losses(tmp_path, options):
    folder, options = tmp_path / "run", ("--batch", "2", "--augment", "--mode", *options)
    script.snapshots(script.models()[0], folder)
    assert_done(run_spread(folder, *options))
    whole, weights = steps(folder), torch.load(folder / "student.pt")
    assert len(whole) == 8
    shutil.rmtree(folder / "checkpoint-8")
    shutil.rmtree(folder / "checkpoint-6")
    assert_done(run_spread(folder, *options, "--resume"))
    assert steps(folder) == whole
    again = torch.load(folder / "student.pt")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_each_process_may_drop_other_layers_of_the_teacher(tmp_path):
    options = ("--batch", "2", "--mode", "trajectory", "--augment", "--layer-drop", "0.5")
    assert_done(run_spread(tmp_path / "run", *options))
    assert len(steps(tmp_path / "run")) == 8


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_process_alone_may_have_labels(tmp_path, rank):
    assert_done(run_spread(tmp_path / "run", "--batch", "2", "--steps", "3", "--mode", "target", "--labels-of", rank))
    assert all(record["task_loss"] > 0 and record["layer_loss"] > 0 for record in steps(tmp_path / "run"))


def test_evaluation_of_batches_that_have_labels_in_one_process_alone_is_refused(tmp_path):
    """The other one would never come to where labels are gathered."""
    done = run_spread(tmp_path / "run", "--batch", "2", "--steps", "1", "--labels-of", "0", "--evaluate")
    assert done.returncode != 0
    assert "labels: got a batch to evaluate without, in 1 of 2 processes; want them in all batches" in done.stderr


def test_two_processes_go_over_a_stream_of_unequal_clips_and_shards(tmp_path):
    """An epoch of 18 clips in one process and 24 in the other ends with the last whole step of both: the fifth."""
    folder = tmp_path / "run"
    assert_done(run_spread(folder, "--batch", "2", "--steps", "7", "--streamed", "--mode", "target"))
    assert [record["epoch"] >= 1 for record in steps(folder)] == [False] * 5 + [True] * 2
    weights = torch.load(folder / "student.pt")
    shutil.rmtree(folder / "checkpoint-7")
    assert_done(run_spread(folder, "--batch", "2", "--steps", "7", "--streamed", "--mode", "target", "--resume"))
    again = torch.load(folder / "student.pt")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    predictions = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert len(predictions[0]) == 5 and (predictions[0] == predictions[1]).all()
