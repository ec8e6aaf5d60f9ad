"""The measuring harness: what it counts, how it predicts, what it refuses."""

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import linconv
from linconv.benchmarking import compare, crossover, fit_quadratic, machine, measure, peak_extra_bytes, predict
from linconv.benchmarking.curves import Curve, latency_curves, memory_curve

MIB = 2**20


def test_compare_alternates_and_stops_at_the_limits():
    calls = []
    taken = compare(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        warmup=1,
        min_repeats=2,
        max_repeats=3,
        min_seconds=60,
    )
    assert calls == ["a", "b", "a", "b", "a", "b", "a", "b"]  # a warm-up each, then three rounds
    assert taken["a"].repeats == taken["b"].repeats == 3
    assert taken["a"].fastest <= taken["a"].median <= taken["a"].slowest


def test_measure_times_the_work_and_not_what_surrounds_it():
    import time

    latency = measure(lambda: time.sleep(0.02), warmup=0, min_repeats=3, min_seconds=0)
    assert 0.02 <= latency.fastest < 0.2


@pytest.mark.parametrize("limits", [{"min_repeats": 0}, {"min_repeats": 5, "max_repeats": 4}])
def test_compare_refuses_limits_that_cannot_be_met(limits):
    with pytest.raises(ValueError, match="min_repeats"):
        compare({"a": lambda: None}, **limits)


def allocate(mebibytes):
    kept = torch.ones(64 * MIB, dtype=torch.uint8)  # built beforehand: not to be counted

    def work():
        return torch.ones(mebibytes * MIB, dtype=torch.uint8).max() + kept[0]

    return work


def test_peak_memory_counts_the_work_alone():
    assert peak_extra_bytes(allocate, 200) == pytest.approx(200 * MIB, abs=12 * MIB)


def fail():
    raise RuntimeError("no such model")


def test_peak_memory_passes_on_what_went_wrong():
    with pytest.raises(RuntimeError, match="no such model"):
        peak_extra_bytes(fail)


LOADING = """
import multiprocessing, pathlib, time
if multiprocessing.parent_process() is not None:
    pathlib.Path(__file__).with_name("begun").touch()
    time.sleep(60)
def make():
    pass
"""


def test_an_interrupt_ends_the_measurement_of_memory_without_a_word_from_its_process(tmp_path):
    """A terminal interrupts every process of a command, which may be loading what it is to measure."""
    (tmp_path / "loading.py").write_text(LOADING)
    code = (
        "import loading, signal; from linconv.benchmarking import peak_extra_bytes\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored, where these tests run in the background
        "try: peak_extra_bytes(loading.make)\n"
        "except KeyboardInterrupt: print('interrupted')"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(linconv.__file__).parents[1])])
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "PYTHONPATH": paths},
    ) as run:  # fmt: skip
        while not (tmp_path / "begun").exists() and run.poll() is None:
            time.sleep(0.05)
        start = time.monotonic()
        os.killpg(run.pid, signal.SIGINT)
        assert run.communicate() == ("interrupted\n", "") and time.monotonic() - start < 30


def test_fit_finds_the_three_terms_and_predicts_from_them():
    lengths = np.array([5.0, 10, 30, 60])
    fit = fit_quadratic(lengths, 0.01 + 0.002 * lengths + 0.0001 * lengths**2)
    assert fit == pytest.approx((0.01, 0.002, 0.0001))
    assert predict(fit, 600) == pytest.approx(0.01 + 1.2 + 36)


def test_fit_of_linear_growth_has_no_negative_square():
    a, b, c = fit_quadratic([1, 2, 4, 8], [1.0, 2.1, 3.9, 7.5])
    assert min(a, b, c) >= 0
    with pytest.raises(ValueError, match="lengths"):
        fit_quadratic([1, 2], [1, 2])


def test_crossover():
    assert crossover([1, 2, 4, 8], [1, 2, 4, 8], [4 / 2**0.5] * 4) == pytest.approx(2 * 2**0.5)
    assert crossover([1, 2], [2, 3], [1, 1]) == 1
    assert crossover([1, 2], [1, 1], [2, 3]) is None
    # Below, above, and below again: what counts is the length from which it stays below.
    assert 4 < crossover([1, 2, 4, 8], [2, 2, 2, 2], [1, 1, 3, 1]) < 8
    with pytest.raises(ValueError, match="must increase"):
        crossover([2, 1], [1, 1], [1, 1])


def test_curves_predict_what_the_budget_does_not_cover(monkeypatch):
    clock = {"teacher": lambda n: n**2 / 100, "student": lambda n: n / 10}

    def forward(checkpoint, audio, samples):
        return lambda: clock[checkpoint](samples)

    def timed(works, **limits):
        from linconv.benchmarking.latency import Latency

        return {name: Latency.of([float(work())]) for name, work in works.items()}

    monkeypatch.setattr("linconv.benchmarking.curves.audio_forward", forward)
    monkeypatch.setattr("linconv.benchmarking.curves.compare", timed)
    monkeypatch.setattr("linconv.benchmarking.curves.peak_extra_bytes", lambda make, *a, preload: 1000.0 * a[-1])
    lengths = [10, 20, 40, 80]
    curves = latency_curves({n: n for n in clock}, "audio.npy", lengths, budget=50, sampling_rate=1)
    assert curves["teacher"].predicted == (False, False, False, True)
    assert curves["teacher"].values == pytest.approx([1, 4, 16, 64])
    assert curves["student"].predicted == (False,) * 4
    assert curves["student"].values == pytest.approx([1, 2, 4, 8])

    memory = memory_curve("teacher", "audio.npy", lengths, curves["teacher"], budget=25, sampling_rate=1)
    assert memory == Curve((10, 20, 40, 80), pytest.approx((1e4, 2e4, 4e4, 8e4)), (False, False, False, True))


def test_a_record_is_on_disk_row_by_row(tmp_path, capsys):
    """A run that is killed leaves what it measured."""
    import json

    from linconv.benchmarking.record import Record

    path = tmp_path / "folder" / "scan.json"
    record = Record("scan", True, path)
    for length in (499, 1000):
        record.add(length=length, seconds=0.5)
        written = json.loads(path.read_text())
        assert written["rows"][-1] == {"length": length, "seconds": 0.5}
    assert len(written["rows"]) == 2 and written["benchmark"] == "scan" and written["provenance"]["freed_memory_kept"]
    assert [p.name for p in path.parent.iterdir()] == ["scan.json"]
    assert "seconds 500.00 ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    "lines, wanted",
    [
        (
            ["processor\t: 0", "cpu family\t: 26", "model\t\t: 2", "model name\t: AMD EPYC", "", "model name\t: other"],
            "AMD EPYC (family 26, model 2)",
        ),
        (["processor : 0", "model name : Some: CPU"], "Some: CPU"),
        (["processor : 0", "CPU part : 0xd40"], platform.processor()),
        (None, platform.processor()),
    ],
)
def test_a_processor_is_told_from_its_next_generation(tmp_path, lines, wanted):
    """Virtual machines name both alike."""
    file = tmp_path / "cpuinfo"
    if lines is not None:
        file.write_text("\n".join(lines))
    assert machine._cpu_model(file) == wanted
