"""Whole runs in processes of their own: killed and resumed, and spread over two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("run.py")


def run(folder, *options, launcher=()):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *launcher, str(SCRIPT), str(folder), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def steps(folder) -> list[dict]:
    """The training records: what was logged at each step, less the clock."""
    records = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "loss" in record]


def assert_done(process):
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.mark.parametrize(
    # Killed between checkpoints (every 3 steps): before and after Hybrid's change at 5, in the first epoch of 6 steps
    # and in the second.
    ("mode", "kill_at"),
    [("hybrid", 5), ("unguided", 4), ("target", 7), ("trajectory", 5), ("waypoint", 4), ("hybrid-trajectory", 7)],
)
def test_resumed_after_a_kill_the_losses_are_the_same_bit_for_bit(tmp_path, mode, kill_at):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = ("--augment", "--mode", mode)
    assert_done(run(whole, *options))
    assert run(broken, *options, "--kill-at", str(kill_at)).returncode == -9
    assert [r["step"] for r in steps(broken)] == list(range(1, kill_at))
    assert_done(run(broken, *options, "--resume"))
    assert [r["step"] for r in steps(broken)] == list(range(1, 9))
    assert steps(broken) == steps(whole)
    weights = [torch.load(folder / "student.pt") for folder in (whole, broken)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("mode", ["hybrid", "trajectory"])
def test_two_processes_give_the_result_of_one(tmp_path, mode):
    one, two = tmp_path / "one", tmp_path / "two"
    assert_done(run(one, "--batch", "4", "--mode", mode))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert_done(run(two, "--batch", "2", "--mode", mode, launcher=launcher))
    for a, b in zip(steps(one), steps(two), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-6), (a["step"], name)
    weights = [torch.load(folder / "student.pt") for folder in (one, two)]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-5)
