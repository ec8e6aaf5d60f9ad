"""Two results of one suite side by side: what became slower or faster by more than the spread of the repeats."""

from __future__ import annotations

from linconv.benchmarking.results import Results
from linconv.benchmarking.scaling import interval
from linconv.errors import UserError

__all__ = ["compare_files"]

_MACHINE = ("cpu", "gpu", "threads", "device", "isa")


def compare_files(before: str, after: str, *, limit: float | None = None) -> tuple[str, bool]:
    """The comparison as text, and whether anything of linconv became slower by more than ``limit`` (default 1.1).

    On one machine, seconds are compared. Between machines they mean nothing, so each implementation is compared by its
    ratio to the case's baseline, measured in turn with it; cases without one are left out. A ratio counts if its
    interval, the middle 95 % of bootstrap draws of the repeats, lies beyond the limit as a whole.

    Raises:
        UserError: a file is missing or of another format, or the results have different suites or nothing in common.
    """
    limit = 1.1 if limit is None else limit
    if limit < 1:
        raise UserError(f"--check: got {limit:g}; want a ratio of at least 1, such as 1.2")
    old, new = Results.read(before), Results.read(after)
    if old.suite != new.suite:
        raise UserError(f"--compare: {before} is of suite {old.suite}, {after} of {new.suite}")
    alike = all(old.runs[-1].get(key) == new.runs[-1].get(key) for key in _MACHINE)
    rows = []
    for key in sorted(old.rows.keys() & new.rows.keys()):
        case, name, length = key
        if not (old.rows[key].get("ours") and new.rows[key].get("ours")):
            continue
        sides = [_samples(results, key, alike) for results in (new, old)]
        if all(sides):
            low, high = interval(*sides)
            ratio = sorted(sides[0])[len(sides[0]) // 2] / sorted(sides[1])[len(sides[1]) // 2]
            verdict = "SLOWER" if low > limit else "faster" if high < 1 / limit else "same"
            rows.append((verdict, ratio, low, high, case, name, length))
    if not rows:
        raise UserError(f"--compare: {before} and {after} have no measured row of linconv in common")
    rows.sort(key=lambda row: (("SLOWER", "faster", "same").index(row[0]), -row[1]))
    basis = "seconds" if alike else "ratio to the baseline of the case, as the machines differ"
    counts = {verdict: sum(row[0] == verdict for row in rows) for verdict in ("SLOWER", "faster", "same")}
    lines = [f"{new.suite}: {after} over {before}, {basis}; limit {limit:g}"]
    lines += [
        f"  {verdict:<6}  {ratio:5.2f} ({low:.2f} to {high:.2f})  {case}: {name}, {length:,}"
        for verdict, ratio, low, high, case, name, length in rows
        if verdict != "same"
    ]
    lines.append(
        f"{len(rows)} compared: {counts['SLOWER']} slower, {counts['faster']} faster, {counts['same']} the same"
    )
    return "\n".join(lines), bool(counts["SLOWER"])


def _samples(results: Results, key: tuple[str, str, int], alike: bool) -> list[float]:
    """Repeats of a row; if machines differ, divided by the median of the baseline at that length."""
    samples = results.rows[key].get("samples") or []
    if alike:
        return list(samples)
    case, _, length = key
    baseline = results.rows.get((case, results.cases[case]["baseline"], length), {})
    if "samples" not in baseline:
        return []
    return [sample / baseline["seconds"] for sample in samples]
