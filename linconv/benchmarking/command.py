"""`linconv bench`: runs suites, reports on results, compares two of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from linconv.errors import UserError, check_output, unknown
from linconv.flags import above_zero, seed

__all__ = ["add_arguments", "main"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="one of `--list all`, or all")
    parser.add_argument("--list", action="store_true", help="say what the suites would run, and stop")
    run = parser.add_argument_group("what is measured")
    run.add_argument(
        "--out",
        metavar="PATH",
        help="folder of results or report (default bench); with --plot or --fits the file to write",
    )
    earlier = run.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="keep what the results have, measure what they lack")
    earlier.add_argument("--overwrite", action="store_true", help="measure all anew, in place of what the results have")
    run.add_argument("--cases", nargs="+", metavar="TEXT", help="only cases with one of these in their name")
    run.add_argument("--work", nargs="+", choices=("forward", "training", "step"), help="only these passes")
    run.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), help="only these dtypes")
    run.add_argument(
        "--batch",
        type=_batch,
        metavar="N",
        help="sequences at once, in place of each case's own; largest: as many, a power of two, as the limits take",
    )
    run.add_argument("--graph", action="store_true", help="time replays of CUDA graphs, without the host's time")
    run.add_argument(
        "--lengths", nargs="+", type=above_zero(int), metavar="L", help="measure at these lengths, predict the others"
    )
    run.add_argument(
        "--without", nargs="+", metavar="TEXT", default=[], help="leave out implementations with this name"
    )
    what = ("latency", "memory")
    run.add_argument("--measure", nargs="+", choices=what, default=list(what), help="what to measure (default both)")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device to run on (default cpu)")
    run.add_argument("--seed", type=seed, default=0, help="of inputs and weights (default 0)")
    run.add_argument(
        "--default-malloc",
        action="store_true",
        help="leave the C library's malloc as it comes: it returns large freed blocks to the system",
    )
    limits = parser.add_argument_group("limits; what goes beyond is predicted from shorter lengths and marked")
    number = above_zero(float)
    limits.add_argument("--budget", type=number, default=600, metavar="S", help="seconds for all (default 600)")
    limits.add_argument("--longest-call", type=number, default=10, metavar="S", help="seconds of one call (default 10)")
    limits.add_argument(
        "--memory-limit", type=number, metavar="GIB", help="of one call (default: 80 %% of what is free)"
    )
    after = parser.add_argument_group("what is done with results")
    one = after.add_mutually_exclusive_group()
    one.add_argument("--report", nargs="+", metavar="FILE", help="Markdown, PNG and HTML from these results, in --out")
    one.add_argument("--plot", nargs="+", metavar="FILE", help="the plot of the README, from these results, as --out")
    one.add_argument("--fits", nargs="+", metavar="FILE", help="the fits `linconv inspect` predicts by, as --out")
    one.add_argument("--compare", nargs=2, metavar=("BEFORE", "AFTER"), help="what became slower or faster")
    after.add_argument(
        "--check", type=number, metavar="RATIO", help="with --compare: status 1 if anything became slower by more"
    )


def _batch(text: str) -> int:
    from linconv.benchmarking.suite import LARGEST

    if text == "largest":
        return LARGEST
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; want a number from 1 up, or largest")
    return int(text)


def main(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status.

    Raises:
        UserError: a name, path or value is invalid.
    """
    if arguments.check is not None and not arguments.compare:
        raise UserError("--check: wants --compare BEFORE AFTER beside it")
    if arguments.out == "":  # from an unset variable, for example: do not write to the default folder instead
        raise UserError("--out: got ''; want a path")
    of_results = next((key for key in ("report", "plot", "fits", "compare") if getattr(arguments, key)), None)
    if arguments.suites and of_results:
        raise UserError(f"bench: got the suite {arguments.suites[0]!r} and --{of_results}; want one after the other")
    if arguments.compare:
        from linconv.benchmarking.comparison import compare_files

        text, slower = compare_files(*arguments.compare, limit=arguments.check)
        print(text)
        return int(slower and arguments.check is not None)
    if of_results:
        return _write(arguments)
    if not arguments.suites:
        raise UserError("bench: got no suite; want one of " + ", ".join(_names()) + ", or all")
    if arguments.graph and arguments.device != "cuda":
        raise UserError(f"--graph: wants --device cuda, got {arguments.device}")
    suites = {name: _cases(name, arguments) for name in _expanded(arguments.suites)}
    empty = [name for name, cases in suites.items() if not cases]
    if empty and (not arguments.list or len(empty) == len(suites)):  # a list of many says which of them have any
        raise UserError(f"bench: no case of {empty[0]} fits --cases, --work, --dtype and --without; see --list")
    if arguments.list:
        _list(suites)
        return 0
    return _run(suites, arguments)


def _write(arguments) -> int:
    from linconv.benchmarking.results import Results

    given = arguments.report or arguments.plot or arguments.fits
    found = [Results.read(path) for path in given]
    try:
        if arguments.report:
            from linconv.benchmarking.report import write

            written = write(found, Path(arguments.out or "bench"))
        elif arguments.plot:
            from linconv.benchmarking.plots import overview

            written = [overview(found, Path(arguments.out or "benchmark.png"))]
        else:
            from linconv.benchmarking.fits import write

            written = [write(found, Path(arguments.out or "layer_fits.json"))]
    except OSError as error:
        raise UserError(f"--out: {error.filename}: {error.strerror}") from error
    for path in written:
        print(f"written to {path}")
    return 0


def _names() -> tuple[str, ...]:
    from linconv.benchmarking.suites import NAMES

    return NAMES


def _expanded(given: list[str]) -> list[str]:
    for name in given:
        if name not in (*_names(), "all"):
            raise unknown("suite", name, (*_names(), "all"))
    return list(_names()) if "all" in given else list(dict.fromkeys(given))


def _cases(suite: str, arguments) -> list:
    from linconv.benchmarking import suites

    found = []
    for case in suites.get(suite, arguments.device):
        setting = case.setting
        if arguments.batch is not None:
            setting = setting.with_batch(arguments.batch)
        if arguments.graph:
            setting = replace(setting, graph=True)
        case = replace(
            case,
            setting=replace(setting, seed=arguments.seed),
            implementations=tuple(
                i for i in case.implementations if not any(text in i.name for text in arguments.without)
            ),
        )
        wanted = (
            (not arguments.work or setting.work in arguments.work)
            and (not arguments.dtype or setting.dtype in arguments.dtype)
            and (not arguments.cases or any(text in case.key for text in arguments.cases))
            and case.implementations
        )
        if wanted:
            found.append(case)
    return list({case.key: case for case in found}.values())


def _list(suites: dict) -> None:
    from linconv.benchmarking.suites import title

    for name, cases in suites.items():
        print(f"{name}: {title(name)}")
        for case in cases:
            lengths = ", ".join(f"{length:,}" for length in case.lengths)
            print(f"  {case.key}\n    {case.unit}: {lengths}")
            print("    " + "; ".join(i.name for i in case.implementations))


def _run(suites: dict, arguments) -> int:
    import time

    import torch

    from linconv.benchmarking.memory import keep_freed_memory
    from linconv.benchmarking.runner import Limits, run

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: got 'cuda', and torch sees no CUDA device")
    found = _results(suites, arguments)
    kept = not arguments.default_malloc and keep_freed_memory()
    end = time.monotonic() + arguments.budget
    failed = False
    for (name, cases), (path, results) in zip(suites.items(), found.items()):
        gib = arguments.memory_limit
        limits = Limits(end - time.monotonic(), arguments.longest_call, gib * 2**30 if gib else None)
        known = len(results.runs)

        def save(results=results, path=path, known=known) -> bool:
            if len(results.runs) == known:  # nothing measured yet
                return False
            results.runs[-1]["freed_memory_kept"] = kept
            results.write(path)
            return True

        try:
            with _progress(name, cases, save) as report:
                run(results, cases, limits, measure=arguments.measure, lengths=arguments.lengths, report=report)
        finally:
            if save():
                print(f"written to {path}")
        for implementation, reason in results.absent.items():
            print(f"absent: {implementation}: {reason}")
        failed = failed or bool(results.failed)
    return int(failed)


def _results(suites: dict, arguments) -> dict:
    """What is added to for each suite, by its file. Measurements are not lost by accident: they may be those of hours.

    Raises:
        UserError: a folder that is none, a file that is there already and nothing said of it, or one that cannot be
            gone on with; before anything is measured.
    """
    from linconv.benchmarking.machine import provenance
    from linconv.benchmarking.results import Results, measured_on

    folder = Path(arguments.out or "bench")
    check_output(str(folder), "--out")
    found = {}
    for name in suites:
        path = folder / f"{name}.json"
        if path.exists() and not (arguments.resume or arguments.overwrite):
            raise UserError(
                f"--out: {path} holds the results of an earlier run; want --resume to go on with them, --overwrite to "
                "measure anew in their place, or another folder"
            )
        found[path] = results = Results.read(path) if path.exists() and arguments.resume else Results(name)
        if results.suite != name:
            raise UserError(f"--resume: {path} holds results of the suite {results.suite}; want those of {name}")
        if results.runs:
            then, now = map(measured_on, (results.runs[-1], {**provenance(), "device": arguments.device}))
            if then != now:
                raise UserError(f"--resume: {path} was measured on {then}, this is {now}; want another folder for it")
    return found


class _progress:
    """A bar over cases, with a line for each finished length above it.

    What was measured is saved with each line: a run that is killed, for want of memory say, can go on with --resume.
    """

    def __init__(self, suite: str, cases: list, save: Callable[[], object]):
        from tqdm import tqdm

        self.keys, self.save = {case.key for case in cases}, save
        self.bar = tqdm(total=len(cases), desc=suite, unit="case", disable=None)

    def __enter__(self):
        return self.report

    def report(self, text: str) -> None:
        if text in self.keys:
            self.bar.update()
        self.bar.write(text)
        sys.stdout.flush()
        self.save()

    def __exit__(self, *error):
        self.bar.close()
