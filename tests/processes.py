"""Processes that are forked from one that has imported what they need: to import it takes seconds each time."""

import contextlib
import multiprocessing
import os
import sys
from multiprocessing import forkserver
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

_fresh = multiprocessing.get_context("forkserver")


@contextlib.contextmanager
def importing(module: str):
    """Within it, processes are forked from one that has imported the module and done nothing."""
    stop = forkserver._forkserver._stop
    stop()  # that of other tests, which has imported something else
    _fresh.set_forkserver_preload([module])
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}  # it looks for modules nowhere else
    with mock.patch.dict(os.environ, environment):
        forkserver.ensure_running()
    yield
    stop()


def start(log: Path, environment: dict[str, str], function, *arguments) -> multiprocessing.Process:
    """A process that calls the function. What it prints is in files beside ``log``, which is none itself."""
    process = _fresh.Process(target=_call, args=(log, {**os.environ, **environment}, function, arguments))
    process.start()
    return process


def finished(process: multiprocessing.Process, log: Path) -> CompletedProcess:
    process.join()
    output, errors = (file.read_text() for file in _files(log))
    return CompletedProcess(process.name, process.exitcode, output, errors)


def _files(log):
    return log.with_suffix(".out"), log.with_suffix(".err")


def _call(log, environment, function, arguments):
    for stream, file in zip((sys.stdout, sys.stderr), _files(log)):
        with open(file, "w") as opened:
            os.dup2(opened.fileno(), stream.fileno())
    os.environ.update(environment)
    function(*arguments)
