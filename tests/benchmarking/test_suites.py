"""The suites, how they are run, and what is said of their results."""

import argparse
import dataclasses
import functools
import gc
import json
import pickle
import statistics
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from linconv.benchmarking import analysis, command, report, runner, suites
from linconv.benchmarking.comparison import compare_files
from linconv.benchmarking.latency import Latency
from linconv.benchmarking.results import Results
from linconv.benchmarking.runner import Limits
from linconv.benchmarking.scaling import crossover_interval, exponent, fit, interval, predict
from linconv.benchmarking.suite import (
    LARGEST,
    Absent,
    Case,
    CheckFailed,
    Cost,
    Implementation,
    Setting,
    Shortcut,
    judge,
    work,
)
from linconv.benchmarking.suites import backends, peers
from linconv.cli import main
from linconv.conversion.crossover import _faster_from
from linconv.errors import UserError

LENGTHS = (10, 20, 40, 80, 160)


def synthetic(setting, length, kind):
    """Work that returns how long it is to have taken: see `clock`."""
    seconds = {"linear": length / 100, "square": length**2 / 3000, "wrong": 0.0}[kind]
    return (lambda: torch.tensor(seconds)), []


def absent(setting, length):
    raise Absent("no such package")


def wrong(setting):
    raise CheckFailed("error 1")


def implementations(failing=False):
    return (
        Implementation("ours", synthetic, ("linear",), ours=True, check=wrong if failing else None),
        Implementation("attention", synthetic, ("square",), degree=2),
        Implementation("package", absent),
    )


def case(failing=False):
    return Case("toy", Setting(), implementations(failing), "attention", LENGTHS)


@pytest.fixture
def clock(monkeypatch):
    """Works take the time they return, give or take a little, and not the time they take."""

    def compare(works, **limits):
        return {
            name: Latency.of([float(function()) * spread for spread in (0.99, 1.0, 1.01)])
            for name, function in works.items()
        }

    monkeypatch.setattr(runner, "compare", compare)
    monkeypatch.setattr(runner, "rates", lambda device, dtypes: {"matmul": {"float32": 1e9}, "copy": 1e9})
    monkeypatch.setattr(runner, "peak_extra_bytes", lambda build, preload: int(1e6 * build.args[-1]))


def measured(cases=None, limits=None, results=None, **keywords):
    results, limits = results or Results("layer"), limits or Limits(call_seconds=3.0)
    runner.run(results, cases or [case()], limits, report=lambda text: None, **keywords)
    return results


def test_what_exceeds_a_limit_is_predicted_from_the_fit_and_says_why(clock):
    results = measured()
    ours, attention = results.series()
    assert ours.seconds == pytest.approx([n / 100 for n in LENGTHS]) and ours.predicted == (None,) * 5
    assert attention.seconds == pytest.approx([n**2 / 3000 for n in LENGTHS])
    assert attention.predicted[:4] == (None,) * 4 and "9 s, the limit is 3 s" in attention.predicted[4]
    assert attention.samples[4] == () and len(attention.samples[3]) == 3
    assert attention.bytes_predicted[4] is not None
    assert results.absent == {"package": "no such package"}


def test_a_run_that_goes_on_measures_what_is_missing_only(clock, monkeypatch):
    results = measured(lengths=(10, 20, 40))
    assert [bool(why) for why in next(results.series()).predicted] == [False] * 3 + [True] * 2
    before = {key: row["samples"] for key, row in results.rows.items() if "samples" in row}
    built = []
    monkeypatch.setattr(runner, "work", lambda make, a, s, length: built.append(length) or work(make, a, s, length))
    measured(results=results, limits=Limits(call_seconds=100))
    assert {length for length in built if length not in runner._TRIED} == {80, 160}
    assert all(results.rows[key]["samples"] == samples for key, samples in before.items())
    assert all(why is None for series in results.series() for why in series.predicted)
    assert len(results.runs) == 2 and results.rows[case().key, "ours", 160]["run"] == 1


def test_a_row_names_the_run_of_its_time_and_that_of_its_memory(clock):
    results = measured(measure=["memory"])
    measured(results=results, measure=["latency"])
    row = results.rows[case().key, "ours", 10]
    assert (row["run"], row["memory_run"]) == (1, 0)


def test_what_is_measured_is_kept_as_it_comes(clock, tmp_path, capsys):
    """A run that is killed has a file of the lengths before, to go on from."""
    arguments = parsed("layer", "--out", tmp_path, "--measure", "latency")
    kept = {}

    def make(setting, length):
        if (tmp_path / "toy.json").exists():
            rows = Results.read(tmp_path / "toy.json").rows.values()
            kept[length] = [row["length"] for row in rows if "samples" in row]
        return synthetic(setting, length, "linear")

    toy = Case("toy", Setting(), (Implementation("ours", make, ours=True),), "ours", LENGTHS)
    assert command._run({"toy": [toy]}, arguments) == 0
    assert [kept[length] for length in LENGTHS[1:]] == [[10], [10, 20], [10, 20, 40], [10, 20, 40, 80]]
    assert Results.read(tmp_path / "toy.json").runs[-1]["freed_memory_kept"] in (True, False)
    assert [path.name for path in tmp_path.iterdir()] == ["toy.json"]


def parsed(*argv):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(list(map(str, argv)))


def test_an_earlier_run_is_not_written_over_by_accident(clock, tmp_path, capsys):
    toys, file = {"layer": [case()], "scan": [case()]}, tmp_path / "scan.json"
    argv = ["layer", "scan", "--out", tmp_path, "--longest-call", "3"]
    assert command._run({"scan": [case()]}, parsed(*argv)) == 0
    before = file.read_text()
    with pytest.raises(
        UserError, match=r"scan\.json holds the results of an earlier run; want --resume .* --overwrite"
    ):
        command._run(toys, parsed(*argv))
    assert file.read_text() == before and [path.name for path in tmp_path.iterdir()] == ["scan.json"]
    assert command._run(toys, parsed(*argv, "--resume")) == 0
    assert len(Results.read(file).runs) == 2
    assert command._run(toys, parsed(*argv, "--overwrite")) == 0
    assert len(Results.read(file).runs) == 1
    with pytest.raises(SystemExit, match="2"):
        parsed(*argv, "--overwrite", "--resume")


def test_a_run_goes_on_with_its_own_results_only(clock, tmp_path):
    results = measured()
    machine = {"device": "cpu", "cpu": "another", "threads": 64}
    elsewhere = changed(results, tmp_path / "layer.json", 1, **machine)
    with pytest.raises(UserError, match=f"--resume: {elsewhere} was measured on another, 64 threads, this is "):
        command._run({"layer": [case()]}, parsed("layer", "--out", tmp_path, "--resume"))
    results.write(tmp_path / "scan.json")
    with pytest.raises(UserError, match="scan.json holds results of the suite layer; want those of scan"):
        command._run({"scan": [case()]}, parsed("scan", "--out", tmp_path, "--resume"))
    with pytest.raises(UserError, match="--out: .*scan.json is a file; want a folder"):
        command._run({"scan": [case()]}, parsed("scan", "--out", tmp_path / "scan.json"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["scan", "--lengths", "0"], "argument --lengths: got '0'; want a whole number above 0"),
        (["scan", "--lengths", "512", "-1"], "argument --lengths: got '-1'; want a whole number above 0"),
        (["scan", "--lengths", "many"], "argument --lengths: got 'many'; want a whole number above 0"),
        (["scan", "--budget", "nan"], "argument --budget: got 'nan'; want a number above 0"),
        (["scan", "--memory-limit", "0"], "argument --memory-limit: got '0'; want a number above 0"),
        (["scan", "--out", ""], "--out: got ''; want a path"),
        (["--report", "x.json", "--out", ""], "--out: got ''; want a path"),
        (["scan", "--seed", "-1"], "argument --seed: got '-1'; want a whole number from 0 to"),
        (["scan", "--report", "x.json"], "got the suite 'scan' and --report; want one after the other"),
        (["--report", "x.json", "--plot", "x.json"], "argument --plot: not allowed with argument --report"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(argv, message, capsys):
    try:
        status = main(["bench", *argv])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr().err.strip()
    assert status == 2 and len(said.splitlines()) == 1 and message in said


def test_a_report_that_cannot_be_written_is_a_mistake(clock, tmp_path, capsys):
    file = tmp_path / "layer.json"
    measured().write(file)
    for out in (file, file / "report"):
        assert main(["bench", "--report", str(file), "--out", str(out)]) == 2
        assert f"error: --out: {file}" in capsys.readouterr().err


def test_a_plot_is_a_png_and_wants_attention(clock, tmp_path, capsys):
    ours, *others = implementations()
    both = dataclasses.replace(ours, name="hydra"), *others
    results = measured([dataclasses.replace(case(), name="layer of width 1024", implementations=both)])
    for rows, name, message in (
        (results.rows, "plot.png", None),
        (results.rows, "plot", "--out: got {}; want a name that ends in .png"),
        (results.rows, "plot.foo", "--out: got {}; want a name that ends in .png"),
        ({k: row for k, row in results.rows.items() if row["ours"]}, "other.png", "--plot: no result has attention in"),
    ):
        results.rows = rows
        results.write(tmp_path / "layer.json")
        argv = ["bench", "--plot", str(tmp_path / "layer.json"), "--out", str(tmp_path / name)]
        assert main(argv) == (2 if message else 0)
        assert (message or "").format(tmp_path / name) in capsys.readouterr().err
        assert (tmp_path / name).exists() == (message is None)


def greedy(setting, length):
    def call():
        if length > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 190 GiB.\nMore about it.")
        return torch.tensor(length / 100)

    return call, []


def hungry(work):
    work()
    raise torch.OutOfMemoryError("CUDA out of memory, measuring it.")


def test_a_run_outlives_what_the_gpu_has_no_memory_for(clock, monkeypatch):
    freed = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    monkeypatch.setattr(runner, "memory_bytes", lambda device: 1e12)
    monkeypatch.setattr(runner, "peak_extra_cuda_bytes", hungry)
    implementations = Implementation("ours", synthetic, ("linear",), ours=True), Implementation("greedy", greedy)
    results = measured([Case("toy", Setting(device="cuda"), implementations, "greedy", LENGTHS)])
    ours, peer = results.series()
    assert [why is None for why in ours.predicted] == [True] * 5
    assert [why is None for why in peer.predicted] == [True, True, True, False, False]
    assert "OutOfMemoryError: CUDA out of memory. Tried to allocate 190 GiB." in peer.predicted[3]
    assert len(freed) == 2 and not any("extra_bytes" in row for row in results.rows.values())


def test_memory_that_is_known_counts_for_more_than_a_fit(clock):
    """Both are measured to need 1 MB a frame; the one that says it needs 1 GB is not called beyond the limit."""
    implementations = (
        Implementation("ours", synthetic, ("linear",), ours=True),
        Implementation("known", synthetic, ("linear",), memory=lambda setting, length: int(1e9) * length),
    )
    results = measured(
        [Case("toy", Setting(), implementations, "ours", LENGTHS)], Limits(call_seconds=3.0, memory_bytes=25e9)
    )
    ours, known = results.series()
    assert [why is None for why in ours.predicted] == [True] * 5
    assert [why is None for why in known.predicted] == [True, True, False, False, False]
    assert "it would need about 37 GiB, the limit is 23 GiB" in known.predicted[2]


def test_attention_keeps_twice_the_matrices_for_gradients():
    forward, training = (peers.weights_bytes(12, Setting(work, "float32"), 1_000) for work in ("forward", "training"))
    assert forward == 2 * 12 * 1_000**2 * 4 and training == 2 * forward


def test_a_run_of_other_cases_leaves_predictions(clock):
    results = measured()
    other = dataclasses.replace(case(), name="other")
    measured([other], results=results)
    assert [s.predicted[4] is not None for s in results.series()] == [False, True] * 2


def test_nothing_is_predicted_from_too_little(clock):
    ours, attention = measured(lengths=(40, 80)).series()
    assert ours.seconds == (None, None, *(pytest.approx(n / 100) for n in (40, 80, 160)))  # not below the shortest
    assert attention.seconds[4] is None and attention.predicted[4] is not None


def test_time_that_is_used_up_is_a_reason(clock):
    results = measured(limits=Limits(seconds=-1))
    assert not results.rows


def on_gpu(monkeypatch, *implementations):
    """A case that is run as on a GPU, where each call is tried before it is timed."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(runner, "peak_extra_cuda_bytes", lambda work: int(work()))
    monkeypatch.setattr(runner, "memory_bytes", lambda device: 1e9)
    return Case("toy", Setting(device="cuda"), implementations, "ours", LENGTHS)


def test_nothing_is_tried_on_a_gpu_after_the_time_is_used_up(clock, monkeypatch):
    now, tried = [0], []
    monkeypatch.setattr(runner, "time", argparse.Namespace(monotonic=lambda: now[0]))

    def make(setting, length):
        now[0] += 2
        tried.append(length)
        return synthetic(setting, length, "linear")

    results = measured([on_gpu(monkeypatch, Implementation("ours", make, ours=True))], Limits(seconds=7.5))
    assert tried == [*runner._TRIED, 10, 10]
    (series,) = results.series()
    assert series.predicted == (None, *[runner.USED_UP] * 4) and series.bytes_predicted == (None,) * 5


def test_a_peer_that_fails_at_a_length_says_why_in_its_own_words(clock, monkeypatch):
    def failing(error):
        def make(setting, length):
            if length > 100:
                raise error
            return synthetic(setting, length, "linear")

        return make

    peers = Implementation("peer", failing(RuntimeError("no kernel\nfor this"))), Implementation("other", absent)
    ours = Implementation("ours", synthetic, ("linear",), ours=True)
    found = {s.name: s for s in measured([on_gpu(monkeypatch, ours, *peers)]).series()}
    assert found["ours"].predicted == (None,) * 5
    assert found["peer"].predicted == found["peer"].bytes_predicted == (None,) * 4 + ("RuntimeError: no kernel",)
    for error, reason in ((RuntimeError(), None), (torch.OutOfMemoryError("none left"), "OutOfMemoryError: none left")):
        case = on_gpu(monkeypatch, Implementation("ours", failing(error), ours=True))
        if reason is None:
            with pytest.raises(RuntimeError):
                measured([case])
        else:
            assert next(measured([case]).series()).predicted == (None,) * 4 + (reason,)


def test_a_wrong_kernel_gets_no_time(clock):
    results = measured([case(failing=True)])
    assert [series.name for series in results.series()] == ["attention"]
    assert results.failed == {f"{case().key}: ours": "error 1"}


def test_a_kernel_that_is_wrong_now_loses_the_times_of_earlier_runs(clock):
    results = measured(lengths=(10, 20))
    measured([case(failing=True)], results=results)
    assert [series.name for series in results.series()] == ["attention"]
    assert results.failed == {f"{case().key}: ours": "error 1"}


def test_checks_too_are_within_the_time_of_the_run(clock, monkeypatch):
    now, checked = [0], []
    monkeypatch.setattr(runner, "time", argparse.Namespace(monotonic=lambda: now[0]))

    def check(name, setting):
        now[0] += 10
        checked.append(name)

    made = [Implementation(n, synthetic, ("linear",), ours=True, check=functools.partial(check, n)) for n in "abc"]
    results = measured([Case("toy", Setting(), tuple(made), "a", LENGTHS)], Limits(seconds=15))
    assert checked == ["a", "b"] and not results.rows


@pytest.mark.parametrize(
    "limits, reason",
    [
        (dict(call_seconds=3.0), "a call would take about 10 s, the limit is 3 s"),
        (dict(call_seconds=1e9, memory_bytes=1e5), "it would need about 0 GiB, the limit is 0 GiB"),
        (dict(call_seconds=1e9, seconds=20), runner.USED_UP),
    ],
)
def test_limits_hold_for_the_first_length_too(clock, limits, reason):
    """Of a batch that is larger than any that is tried, in proportion to what the short tries took."""
    built = []

    def make(setting, length):
        built.append((setting.batch, length))
        return (lambda: torch.tensor(setting.batch * length * 1e-4)), [torch.zeros(setting.batch, length)]

    huge = Case("toy", Setting(batch=1_000), (Implementation("ours", make, ours=True),), "ours", (100, 200))
    results, said = Results("toy"), []
    runner.run(results, [huge], Limits(**limits), measure=["latency"], lengths=(100,), report=said.append)
    assert said[-1] == f"  ours is not timed at any length: {reason}"
    assert built == [(8, length) for length in runner._TRIED] and not results.rows


def test_an_error_in_ours_is_no_reason_to_be_absent(clock):
    broken = Implementation("ours", synthetic, ("no such kind",), ours=True)
    with pytest.raises(KeyError):
        measured([Case("toy", Setting(), (broken,), "ours", LENGTHS)])


def test_blocks_make_up_a_model(clock):
    shortcut = Shortcut(("linear",), synthetic, ("linear",), times=3, up_to=20)
    model = Implementation("ours", synthetic, ("square",), ours=True, shortcut=shortcut)
    results = measured([Case("toy", Setting(), (model,), "ours", LENGTHS)], limits=Limits(call_seconds=1e9))
    [series] = results.series()
    assert series.composed == (False, False, True, True, True)
    assert series.seconds[1] == pytest.approx(20**2 / 3000)
    assert series.seconds[4] == pytest.approx(1.6 + 3 * 1.6)


def batched(setting, length, per_sequence):
    """Takes as long as its sequences one after another."""
    return (lambda: torch.tensor(setting.batch * per_sequence * length)), [torch.zeros(setting.batch, 1000)]


def test_the_largest_batch_keeps_within_the_limits_and_is_told_by_the_sequence(clock, monkeypatch):
    def peak(build, preload):
        *_, setting, length = build.args
        return int(1e6 * length * setting.batch)

    monkeypatch.setattr(runner, "peak_extra_bytes", peak)
    cost = lambda setting, length: Cost(bytes=setting.batch * length)  # noqa: E731
    quick = Implementation("ours", batched, (1e-4,), ours=True, cost=cost)
    slow = Implementation("attention", batched, (1e-2,))
    largest = Case("toy", Setting(batch=LARGEST), (quick, slow), "attention", LENGTHS)
    assert largest.key.endswith("largest batch")
    results = measured([largest], limits=Limits(call_seconds=1.0, memory_bytes=700e6))
    ours, attention = results.series()
    # Of ours memory is the limit, of the other time: 70, 35, ... and 10, 5, ... sequences, to a power of two.
    assert ours.batch == (64, 32, 16, 8, 4) and attention.batch == (8, 4, 2, 1, None)
    assert attention.predicted[:4] == (None,) * 4 and "the limit is 1 s" in attention.predicted[4]
    for series, seconds in ((ours, 1e-4), (attention, 1e-2)):
        assert series.seconds == pytest.approx([seconds * n for n in LENGTHS])
        assert series.extra_bytes[:4] == tuple(1e6 * n for n in LENGTHS[:4])
    assert ours.floor_seconds == pytest.approx([n * 1e-9 for n in LENGTHS])
    results.runs[-1] |= {"gpu": None, "cpu": "x", "device": "cpu"}
    assert "64 at once" in "".join(map(str, report._latency_table(results, largest.key, [ours, attention])))


def test_a_graph_is_captured_of_the_same_work(monkeypatch):
    from linconv.benchmarking import suite

    captured = []
    monkeypatch.setattr(suite, "graphed", lambda work: captured.append(work) or work)
    setting = Setting(graph=True)
    done = work(synthetic, ("linear",), setting, 200)
    assert captured == [done] and done().item() == 2
    assert case().with_setting(graph=True).key == f"{case().key}, CUDA graph"
    work(synthetic, ("linear",), dataclasses.replace(setting, graph=False), 200)
    assert len(captured) == 1


def test_what_a_graph_reads_stays_in_memory(monkeypatch):
    from linconv.benchmarking.latency import graphed

    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    weights = torch.ones(3)
    replay, lives = graphed(lambda weights=weights: weights.sum()), weakref.ref(weights)
    del weights
    gc.collect()
    assert lives() is not None and replay().item() == 3
    del replay
    gc.collect()
    assert lives() is None


def test_judge_knows_right_from_wrong():
    def exact(x):
        return (x * 3).sin()

    x = [torch.randn(50)]
    judge(exact, exact, exact, x)
    for broken in (lambda x: exact(x) + 1e-3, lambda x: exact(x) * torch.nan, lambda x: exact(x.detach()) + 0 * x):
        with pytest.raises(CheckFailed):
            judge(broken, exact, exact, x)


# ---- What results say


def test_results_are_the_same_from_a_file(clock, tmp_path):
    results = measured()
    results.write(tmp_path / "toy.json")
    again = Results.read(tmp_path / "toy.json")
    assert list(again.series()) == list(rounded(results.series()))
    assert (again.runs, again.cases, again.absent) == (results.runs, results.cases, results.absent)


def rounded(all_series):
    def nanoseconds(values):
        return tuple(value if value is None else round(value, 9) for value in values)

    for s in all_series:
        samples = tuple(map(nanoseconds, s.samples))
        yield dataclasses.replace(s, seconds=nanoseconds(s.seconds), samples=samples)


EMPTY = {"format": 1, "suite": "layer", "runs": [], "cases": {}, "absent": {}, "failed": {}, "rows": []}
RUN = {"device": "cpu", "cpu": "x", "threads": 1}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"benchmark": "layer", "rows": []}',
        '{"format": 1, "suite": "layer"}',
        json.dumps(EMPTY),
        json.dumps({**EMPTY, "runs": [{}]}),
        json.dumps({**EMPTY, "runs": [RUN], "rows": [{"case": "x"}]}),
        json.dumps({**EMPTY, "runs": [RUN], "rows": [1]}),
    ],
    ids=["cut off", "list", "other", "without rows", "without runs", "empty run", "part of a row", "no row"],
)
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(UserError, match="other.json"):
        Results.read(path)
    with pytest.raises(UserError, match="No such file"):
        Results.read(tmp_path / "none.json")


def test_crossover_and_growth_and_losses(clock):
    results = measured()
    [crossing] = analysis.crossovers(results)
    assert crossing.length == pytest.approx(30, rel=0.02)  # n / 100 = n² / 3000
    assert crossing.low <= crossing.length <= crossing.high and crossing.high < 1.1 * crossing.low
    assert not crossing.predicted
    ours, attention = results.series()
    assert analysis.growth(ours) == pytest.approx(1) and analysis.growth(attention) == pytest.approx(2)
    [loss] = analysis.losses(results)
    assert (loss.what, loss.lengths, loss.worst) == ("time", (10, 20), 10) and loss.ratio == pytest.approx(3)


def test_an_interval_widens_with_the_spread_of_the_repeats():
    lengths = [10, 20, 40, 80]
    square = [[n**2 / 3000] * 5 for n in lengths]

    def width(spread):
        linear = [[n / 100 * (1 + spread * k) for k in (-2, -1, 0, 1, 2)] for n in lengths]
        low, high = crossover_interval(lengths, square, linear)
        assert low <= 30.1 and high >= 29.9
        return high - low

    assert width(0.0) < 0.01 < width(0.02) < width(0.1)
    slow = [[n] * 5 for n in lengths]
    assert crossover_interval(lengths, square, slow) == (None, None)
    # Lengths without repeats are predicted: attention's square is seen beyond what was measured.
    assert crossover_interval([*lengths, 10_000], [*square, []], [*slow, []])[1] is not None


def test_fits():
    assert fit([10, 20], [1.0, 2.0], 1) == pytest.approx((0, 0.1, 0), abs=1e-12)
    assert predict(fit([10], [1.0], 2), 20) == pytest.approx(4)  # of one value all is the highest term
    assert exponent([1, 2, 4, 8], [1, 4, 16, 64]) == pytest.approx(2) and exponent([1], [1]) is None
    low, high = interval([2.0, 2.1, 1.9], [1.0, 1.05, 0.95])
    assert low < 2 < high
    with pytest.raises(ValueError, match="lengths, values"):
        fit([1], [], 1)


def changed(results, path, factor, name="ours", **run):
    results.write(path)
    data = json.loads(path.read_text())
    data["runs"][-1].update(run)
    for row in data["rows"]:
        if row["implementation"] == name and "samples" in row:
            row["samples"] = [factor * sample for sample in row["samples"]]
            row["seconds"] = statistics.median(row["samples"])
    path.write_text(json.dumps(data))
    return str(path)


def test_compare_finds_what_became_slower(clock, tmp_path, capsys):
    results = measured()
    before, slower, same, other = (tmp_path / f"{name}.json" for name in ("before", "slower", "same", "other"))
    before, slower = changed(results, before, 1), changed(results, slower, 1.5)
    same = changed(results, same, 1.01)
    assert compare_files(before, slower)[1] and not compare_files(before, same)[1]
    assert compare_files(slower, before)[0].count("faster") > 1
    # Another machine, twice as slow in all: its ratios to the baseline are compared, and they are the same.
    other = changed(Results.read(changed(results, other, 2)), other, 2, "attention", cpu="another")
    text, found = compare_files(before, str(other))
    assert not found and "ratio to the baseline" in text
    assert main(["bench", "--compare", before, slower, "--check", "1.2"]) == 1
    assert main(["bench", "--compare", before, slower, "--check", "1.6"]) == 0
    assert main(["bench", "--compare", before, slower]) == 0
    assert "SLOWER" in capsys.readouterr().out
    assert main(["bench", "--compare", before, slower, "--check", "0.5"]) == 2


def test_report_is_self_contained_and_marks_what_is_predicted(clock, tmp_path):
    results = measured()
    written = report.write([results], tmp_path)
    assert [path.suffix for path in written] == [".md", ".html", ".png"] and all(path.exists() for path in written)
    text, page = (path.read_text() for path in written[:2])
    for said in (text, page):
        assert "~8.53 s" in said and "no such package" in said and "up to 3.00 times the time of attention" in said
    assert "<svg" in page and "src=" not in page and "<script" not in page and '<link rel="stylesheet' not in page
    ids = [part.split('"')[0] for part in page.split(' id="')[1:]]
    assert len(ids) == len(set(ids))


# ---- The suites themselves


@pytest.mark.parametrize("name", suites.NAMES)
def test_cases_are_whole(name):
    cases = suites.get(name)
    assert len({case.key for case in cases}) == len(cases)
    for each in cases:
        names = [i.name for i in each.implementations]
        assert each.baseline in names and len(set(names)) == len(names)
        assert list(each.lengths) == sorted(set(each.lengths))
        assert any(i.ours for i in each.implementations)
        for i in each.implementations:  # memory is measured in another process
            pickle.dumps(functools.partial(runner.warmed, i.make, i.arguments, each.setting, 10))
            if i.cost is not None and "linformer" not in i.name:
                cost = i.cost(each.setting.with_batch(1), 100)
                assert cost.flops + cost.bytes > 0


@pytest.mark.parametrize("name", ["scan", "selective_scan", "conv", "linformer"])
def test_the_bytes_of_a_floor_are_no_more_than_there_are(name):
    """Every input read and the result written; for gradients inputs once more, its gradient, and theirs written."""
    for each in suites.get(name):
        setting, length = dataclasses.replace(each.setting, dtype="float32"), 100
        for i in each.implementations:
            if i.cost is not None and i.ours:
                function, inputs = i.make(setting, length, *i.arguments)
                result = function().nbytes
                read = sum(t.nbytes for t in inputs if t.dim() > 2)  # the others are parameters
                there = read + result if setting.work == "forward" else 3 * read + 2 * result
                assert 0.6 * there < i.cost(setting, length).bytes <= there


@pytest.mark.parametrize("name", ["scan", "selective_scan", "conv", "linformer", "loss"])
def test_on_a_gpu_each_backend_is_an_implementation_of_its_own(name, monkeypatch):
    state = {"cuda": "no library", "triton": "no GPU"}
    monkeypatch.setattr(backends.ops, "backends", lambda: state)
    # A check compares gradients with those of plain torch, which take long; ours are absent before it comes to that.
    monkeypatch.setattr(torch.autograd, "grad", lambda results, inputs, *_, **__: inputs)
    for each in suites.get(name, "cuda"):
        ours = [i for i in each.implementations if i.ours]
        assert {i.name.split(",")[0] for i in ours} == {"linconv (cuda)", "linconv (triton)"}
        for i in ours:
            pickle.dumps(functools.partial(runner.warmed, i.make, i.arguments, each.setting, 10))
            with pytest.raises(Absent, match="no library" if "(cuda)" in i.name else "no GPU"):
                i.check(dataclasses.replace(each.setting, device="cpu"))


@pytest.mark.parametrize("name", ["scan", "selective_scan", "conv", "linformer", "loss"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_operators_pass_their_checks_and_run(name, dtype):
    for each in suites.get(name):
        if each.setting.dtype != dtype or each.setting.work != "training":
            continue
        for i in each.implementations:
            if "50,257" in each.key:
                continue
            try:
                torch.manual_seed(0)
                if i.check is not None:
                    i.check(each.setting)
                work(i.make, i.arguments, each.setting, 5)()
            except Absent as reason:
                assert str(reason)


def test_a_peer_whose_package_does_not_import_is_taken_singly(tmp_path, monkeypatch):
    package = tmp_path / "a_peer_of_ours"
    (package / "ops").mkdir(parents=True)
    (package / "__init__.py").write_text("import an_extension_that_is_not_there")
    (package / "ops" / "__init__.py").touch()
    (package / "ops" / "good.py").write_text("answer = 42")
    (package / "ops" / "bad.py").write_text("from a_peer_of_ours import answer")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(peers._PACKAGES, "a_peer_of_ours", "a-peer")
    with pytest.raises(Absent, match="a-peer does not import.*an_extension_that_is_not_there"):
        peers.need("a_peer_of_ours.ops.bad", "cuda")
    assert peers.need("a_peer_of_ours.ops.good", "cuda").answer == 42
    with pytest.raises(Absent, match="CUDA devices only"):
        peers.need("a_peer_of_ours.ops.good", "cpu")


@pytest.mark.parametrize(
    ("suite", "of"),
    [("model", ("whisper-tiny encoder", "hydra", 1, 64)), ("generation", ("pythia-160m", "mamba, expand 1", 1))],
)
def test_a_conversion_that_breaks_is_no_absence(suite, of, monkeypatch):
    def broken(model, **options):
        raise TypeError("broken")

    monkeypatch.setattr("linconv.convert", broken)
    with pytest.raises(TypeError, match="broken"):
        suites._module(suite).build(*of)


def test_layers_of_mixed_lengths():
    [each] = [c for c in suites.get("layer") if c.setting.mixed]
    assert each.setting.frames(80) == 10 + 20 + 30 + 40 + 50 + 60 + 70 + 80
    for i in each.implementations:
        if i.reason is None and i.name != "linformer":
            y = work(i.make, i.arguments, each.setting, 16)()
            assert y.shape == (8, 16, 1024) and not y.isnan().any()


def test_wrong_names_end_in_one_line(capsys):
    assert main(["bench", "layr"]) == 2
    assert "did you mean 'layer'" in capsys.readouterr().err
    assert main(["bench"]) == 2
    for flag in ("--cases", "no such case"), ("--without", "i", "a", "e"):
        for argv in (["scan"], ["scan", "--list"]):
            assert main(["bench", *argv, *flag]) == 2
            assert "no case of scan fits" in capsys.readouterr().err
    assert main(["bench", "scan", "conv", "--list", "--cases", "scan of"]) == 0  # which of them have such a case
    assert "scan of 16 heads" in capsys.readouterr().out
    assert main(["bench", "scan", "--list"]) == 0
    assert "scan of 16 heads" in capsys.readouterr().out


@example(1.0, -2e-311, 0.0)  # a length beyond every float
@given(*(st.floats(-50, 50) for _ in range(2)), st.floats(-2, 2).filter(lambda c: c == 0 or abs(c) > 1e-2))
def test_least_length_from_which_a_fit_stays_below_another(a, b, c):
    found = _faster_from(a, b, c)
    below = [a + b * n + c * n * n < 0 for n in range(1, 6_000)]
    if found is None:
        assert not all(below[-3:]) or c > 0 or abs(b) < 0.05
    elif found < 5_000:
        assert all(below[found - 1 :])
        assert found == 1 or not below[found - 2]


def test_inspect_predicts_by_fits_to_results(clock, tmp_path, monkeypatch):
    """Width 1024: n / 100 against n² / 3000 meet at 30 frames; at half the width at 15."""
    from linconv.benchmarking.fits import write
    from linconv.benchmarking.suites.layer import build
    from linconv.conversion import crossover

    made = (
        Implementation("hydra", synthetic, ("linear",), ours=True),
        Implementation("attention", synthetic, ("square",), degree=2),
    )
    results = measured([Case("layer", Setting(), made, "attention", LENGTHS, facts={"width": 1024})])
    file = write([results], tmp_path / "fits.json")
    monkeypatch.setattr(crossover, "_layers", lambda: json.loads(file.read_text())["layers"])
    operations = build("hydra", 1024, 1).flops(1)
    at = crossover.measured_crossover("hydra", 1024, operations)
    assert at.frames == pytest.approx(30, abs=1) and (at.shortest, at.longest, at.extrapolated) == (10, 80, False)
    assert "width 1024 in float32" in at.basis
    at = crossover.measured_crossover("hydra", 512, operations / 4)
    assert at.frames == pytest.approx(15, abs=1) and at.extrapolated
    assert "scaled to width 512, outside of those measured (1024 to 1024)" in at.basis
    assert crossover.measured_crossover("bimamba2", 1024, operations) is None


def test_committed_fits_are_those_to_the_committed_results(tmp_path):
    """To the digit, whatever SciPy makes of the last ones."""
    from linconv.benchmarking.fits import write
    from linconv.conversion import crossover

    root = Path(__file__).parents[2]
    file = write([Results.read(root / "benchmarks/results/cpu/suites/layer.json")], tmp_path / "fits.json")
    assert file.read_text() == Path(crossover.__file__).with_name("layer_fits.json").read_text()


def test_batch_on_the_command_line(capsys):
    assert main(["bench", "layer", "--list", "--batch", "largest", "--cases", "width 1024, forward, float32"]) == 0
    assert "width 1024, forward, float32, largest batch" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "layer", "--list", "--batch", "0"])
    assert "want a number from 1 up, or largest" in capsys.readouterr().err


def test_graphs_on_the_command_line(capsys):
    assert main(["bench", "conv", "--list", "--device", "cuda", "--batch", "8", "--graph", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.count("bfloat16, batch 8, CUDA graph") == 2
    assert main(["bench", "conv", "--list", "--graph"]) == 2
    assert "--graph: wants --device cuda, got cpu" in capsys.readouterr().err


@pytest.mark.parametrize("mixed", [False, True])
def test_models_are_checked_as_they_are_timed(mixed, monkeypatch):
    from linconv.benchmarking.suites import model

    sizes = model._sizes(128, 2, 128, conv_dim=(16,) * 7, **model.LARGE)
    monkeypatch.setitem(model.MODELS, "small", (model._wav2vec2, 1, sizes, ("hydra",)))
    model.check("small", "hydra", Setting(batch=3, mixed=mixed))


def test_generation_is_timed_as_it_is_checked(monkeypatch):
    from linconv.benchmarking.suites import generation

    sizes = dict(hidden_size=64, num_attention_heads=2, intermediate_size=64)
    monkeypatch.setitem(generation.MODELS, "small", (2, sizes))
    for mixer in generation.MIXERS:
        generation.check("small", mixer, Setting())
    seen = []
    real = generation._cached

    def watched(model, given, cache):
        seen.append(cache.get_seq_length())
        return real(model, given, cache)

    monkeypatch.setattr(generation, "_cached", watched)
    for name in (*generation.MIXERS, None):
        function, _ = generation.next_token(Setting(), 20, "small", name, 2)
        seen.clear()
        with torch.no_grad():
            assert [function().shape for _ in range(3)] == [(1, 1, 50_304)] * 3
        if name is None:
            assert seen == [20] * 3  # each call finds what the first one found
        assert generation.prompt(Setting(), 20, "small", name, 2)[0]().shape == (1, 1, 50_304)
        assert generation.block(Setting(), 20, "small", name)[0]().shape == (1, 20, 64)
