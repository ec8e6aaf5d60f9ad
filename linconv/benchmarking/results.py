"""Results of suites: a JSON file of what was measured, on which machine, and what was not measured and why."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from linconv.benchmarking.scaling import fit, predict
from linconv.errors import UserError

__all__ = ["Results", "Series", "measured_on"]

FORMAT = 1


@dataclass(frozen=True)
class Series:
    """An implementation of a case over all its lengths, shortest first.

    seconds, extra_bytes: median of a call, and peak memory above model and input; None if unknown.
    samples: the repeats, empty if predicted. predicted, bytes_predicted: why a value is predicted, or None.
    composed: whether seconds are those of one block times the number of blocks.
    batch: sequences at once if the case leaves that open (seconds and bytes are then per sequence), else None.
    """

    case: str
    name: str
    ours: bool
    degree: int
    lengths: tuple[int, ...]
    seconds: tuple[float | None, ...]
    samples: tuple[tuple[float, ...], ...]
    predicted: tuple[str | None, ...]
    composed: tuple[bool, ...]
    batch: tuple[int | None, ...]
    floor_seconds: tuple[float | None, ...]
    extra_bytes: tuple[float | None, ...]
    bytes_predicted: tuple[str | None, ...]

    def measured(self) -> tuple[list[int], list[float]]:
        """Lengths and seconds that were measured, not predicted from others."""
        pairs = [(n, s) for n, s, why in zip(self.lengths, self.seconds, self.predicted) if s and not why]
        return [n for n, _ in pairs], [s for _, s in pairs]


class Results:
    """Results of the runs of one suite.

    runs: provenance of each run that added rows. cases: their descriptions by key. rows: one for each case,
    implementation and length. absent: reasons by implementation, failed: by case and implementation.
    """

    def __init__(self, suite: str):
        self.suite = suite
        self.runs: list[dict] = []
        self.cases: dict[str, dict] = {}
        self.rows: dict[tuple[str, str, int], dict] = {}
        self.absent: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    # ---- Rows

    def row(self, case: str, implementation: str, length: int) -> dict:
        """The row for this key, created if there is none."""
        names = {"case": case, "implementation": implementation, "length": length}
        return self.rows.setdefault((case, implementation, length), names)

    def values(self, case: str, implementation: str, what: str) -> tuple[list[int], list[float]]:
        """Lengths and measured values of ``seconds`` or ``extra_bytes``."""
        why = f"{what}_predicted"
        rows = [r for (c, i, _), r in sorted(self.rows.items()) if (c, i) == (case, implementation)]
        rows = [r for r in rows if what in r and why not in r]
        return [r["length"] for r in rows], [r[what] for r in rows]

    def expected(self, case: str, implementation: str, what: str, length: int, degree: int) -> float | None:
        """The value at ``length`` predicted from the measured ones; None if there are none."""
        lengths, values = self.values(case, implementation, what)
        if length in lengths:
            return values[lengths.index(length)]
        return predict(fit(lengths, [max(v, 1e-9) for v in values], degree), length) if lengths else None

    def forget(self, case: str, implementation: str) -> None:
        """Remove all results of an implementation of a case."""
        self.rows = {key: row for key, row in self.rows.items() if key[:2] != (case, implementation)}

    def forget_predictions(self, cases: Iterable[str]) -> None:
        """Remove predictions of these cases, for a run that will measure them."""
        for row in (row for row in self.rows.values() if row["case"] in cases):
            for what in ("seconds", "extra_bytes"):
                if row.pop(f"{what}_predicted", None):
                    row.pop(what, None)

    def series(self, case: str | None = None) -> Iterator[Series]:
        """All implementations that have rows, ours first, of one case or of all."""
        names = {}
        for key, name, _ in self.rows:
            if case in (None, key):
                names[key, name] = None
        for key, name in sorted(names, key=lambda pair: (list(self.cases).index(pair[0]), not self._ours(*pair))):
            rows = [r for (c, i, _), r in sorted(self.rows.items()) if (c, i) == (key, name)]

            def column(what, missing=None, rows=rows):
                return tuple(row.get(what, missing) for row in rows)

            yield Series(
                key, name, rows[0].get("ours", False), rows[0].get("degree", 1), column("length"), column("seconds"),
                tuple(map(tuple, column("samples", ()))), column("seconds_predicted"), column("composed", False),
                column("batch"), column("floor_seconds"), column("extra_bytes"), column("extra_bytes_predicted"),
            )  # fmt: skip

    def _ours(self, case: str, name: str) -> bool:
        return any(r.get("ours") for (c, i, _), r in self.rows.items() if (c, i) == (case, name))

    # ---- Files

    def write(self, path: str | Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n  ".join(json.dumps(_rounded(row)) for _, row in sorted(self.rows.items()))
        head = {
            "format": FORMAT, "suite": self.suite, "runs": self.runs, "cases": self.cases, "absent": self.absent,
            "failed": self.failed,
        }  # fmt: skip
        text = json.dumps(head, indent=1).removesuffix("\n}")
        part = path.with_suffix(".part")  # a process killed while writing leaves the old file
        part.write_text(f'{text},\n "rows": [\n  {rows}\n ]\n}}\n')
        part.replace(path)

    @classmethod
    def read(cls, path: str | Path) -> Results:
        """Raises:
        UserError: the file does not exist, or is not a result of `linconv bench`.
        """
        try:
            data = json.loads(Path(path).read_text())
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{path}: not JSON: {error}") from error
        whole = {"suite", "runs", "cases", "absent", "failed", "rows"}
        wrong = UserError(f"{path}: not a result of `linconv bench` (format {FORMAT})")
        if not isinstance(data, dict) or data.get("format") != FORMAT or not whole <= data.keys() or not data["runs"]:
            raise wrong
        results = cls(data["suite"])
        results.runs, results.cases = data["runs"], data["cases"]
        results.absent, results.failed = data["absent"], data["failed"]
        try:
            measured_on(results.runs[-1])
            for row in data["rows"]:
                results.rows[row["case"], row["implementation"], row["length"]] = row
        except (KeyError, TypeError) as error:
            raise wrong from error
        return results


def measured_on(run: dict) -> str:
    """The parts of a run's provenance that affect speed."""
    return run["gpu"] if run["device"] == "cuda" else f"{run['cpu']}, {run['threads']} threads"


def _rounded(row: dict) -> dict:
    """Times to the nanosecond: more digits are noise."""
    row = dict(row)
    for name in ("seconds", "floor_seconds"):
        if row.get(name) is not None:
            row[name] = round(row[name], 9)
    if "samples" in row:
        row["samples"] = [round(value, 9) for value in row["samples"]]
    return row
