"""Rows of a benchmark: printed as they arrive, saved as JSON with their provenance."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from linconv.benchmarking.machine import provenance
from linconv.benchmarking.memory import keep_freed_memory

__all__ = ["Record", "run"]


class Record:
    """Collects rows, prints each, and keeps the file at ``path`` up to date: a killed run leaves its rows.

    A row is a dict of names and numbers; times are seconds, sizes bytes.
    """

    def __init__(self, benchmark: str, freed_memory_kept: bool = False, path: Path | None = None):
        self.rows, self.path = [], path
        measured_on = {**provenance(), "freed_memory_kept": freed_memory_kept}
        self.result = {"benchmark": benchmark, "provenance": measured_on, "rows": self.rows}

    def add(self, **row) -> None:
        self.rows.append(row)
        print("  ".join(f"{name} {_short(name, value)}" for name, value in row.items()), flush=True)
        if self.path:
            self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.result, indent=1) + "\n")
        part.replace(self.path)


def _short(name: str, value) -> str:
    if isinstance(value, float):
        return f"{value * 1e3:.2f} ms" if name.endswith("seconds") else f"{value:.3g}"
    return str(value)


def run(benchmark: str, description: str, lengths: list[int], body, widths: list[int] | None = None) -> None:
    """The command line of a benchmark: ``body(record, lengths)`` between arguments and result file.

    With ``widths`` there is an option to choose some of them, and ``body(record, lengths, widths)``.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--lengths", type=int, nargs="*", default=lengths, help="numbers of frames")
    if widths:
        parser.add_argument("--widths", type=int, nargs="*", default=widths, choices=widths, help="of the model")
    parser.add_argument("--out", type=Path, help="JSON file for the rows and what they were measured on")
    parser.add_argument(
        "--default-malloc",
        action="store_true",
        help="leave the allocator as it comes: see keep_freed_memory",
    )
    options = parser.parse_args()
    record = Record(benchmark, not options.default_malloc and keep_freed_memory(), options.out)
    body(record, options.lengths, *([options.widths] if widths else []))
    if options.out:
        print(f"written to {options.out}")
