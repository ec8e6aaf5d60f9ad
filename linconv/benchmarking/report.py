"""A report on results: Markdown with PNG files, and one self-contained HTML page."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path

from linconv.benchmarking import analysis, plots
from linconv.benchmarking.results import Results, measured_on

__all__ = ["write"]

_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2rem auto; padding: 0 1.5rem; }
h1, h2, h3 { line-height: 1.25; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; margin: 1rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .7rem; text-align: right; white-space: nowrap; }
th { background: #f4f4f4; }
th:first-child, td:first-child, table.text td, table.text th { text-align: left; }
table.text td { white-space: normal; }
figure { margin: 1rem 0; }
figure svg { width: 100%; height: auto; }
nav ul { columns: 2; padding-left: 1.2rem; font-size: 14px; }
"""

_METHOD = (
    "linconv and other packages are timed only after their numbers passed a check in the same run: the error against "
    "float64 is at most twice plain torch's at that precision, three times for gradients. Torch's own operators and "
    "transformers' fallback are not checked. Implementations of a case are called in "
    "turn, on fresh random inputs, after a warm-up; times are medians. Peak memory is above model and input: of a "
    "process of its own on CPU, by torch's allocator on CUDA. The floor is the operations over the measured rate of "
    "torch.mm, or the bytes over the measured rate of a copy, whichever is longer. ~ marks what was not measured but "
    "predicted from a + b·length + c·length², fitted to shorter lengths (c = 0 where growth is linear); † what is "
    "composed, of a model of one layer and one block times the number of the others. Of a largest batch, "
    "the largest power of two of sequences that fits into the run's limits of memory and of time for a call, times and "
    "memory are of one sequence. Intervals are the middle "
    "95 % of bootstrap draws of the repeats."
)


def write(all_results: Sequence[Results], folder: Path) -> list[Path]:
    """Write report.md, report.html and a PNG per case into ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks = list(_blocks(all_results))
    written = [folder / "report.md", folder / "report.html"]
    written[0].write_text(_markdown(blocks), encoding="utf-8")
    written[1].write_text(_html(blocks), encoding="utf-8")
    for kind, *content in blocks:
        if kind == "figure":
            results, case = content
            written.append(plots.case_png(results, case, folder / f"{_slug(case)}.png"))
    return written


# ---- Content, as blocks: (kind, content...)


def _blocks(all_results: Sequence[Results]):
    yield "h1", "linconv benchmarks"
    for results in all_results:
        yield "p", f"Suite {results.suite}: {_measured_on(results)}."
    yield "contents", [case for results in all_results for case in results.cases if any(results.series(case))]
    yield "h2", "Crossover"
    rows = [_crossover_row(results, c) for results in all_results for c in analysis.crossovers(results)]
    yield "p", "From which length on linconv is faster than exact attention."
    yield "text", ["case", "linconv", "faster from", "interval"], rows or [["none measured", "", "", ""]]
    yield "h2", "Where linconv loses"
    yield "p", "Where linconv takes more time than another, over 5 % more memory, or much more time than its floor."
    yield from _losses(all_results)
    for results in all_results:
        yield "h2", f"Suite {results.suite}"
        for case in results.cases:
            series = list(results.series(case))
            if series:
                yield "h3", case
                yield "figure", results, case
                yield "table", *_latency_table(results, case, series)
                if any(any(s.extra_bytes) for s in series):
                    yield "table", *_memory_table(results, case, series)
                yield from _reasons(series)
    yield "h2", "Absent"
    rows = [[results.suite, name, reason] for results in all_results for name, reason in results.absent.items()]
    yield "text", ["suite", "implementation", "why it was not measured"], rows or [["", "none", ""]]
    failed = [[results.suite, name, reason] for results in all_results for name, reason in results.failed.items()]
    if failed:
        yield "h2", "Failed checks"
        yield "text", ["suite", "implementation", "what was wrong; it has no times"], failed
    yield "h2", "How it was measured"
    yield "p", _METHOD
    for results in all_results:
        yield "text", ["run of " + results.suite, "on"], [[run["date"], _run(run)] for run in results.runs]


def _measured_on(results: Results) -> str:
    last = results.runs[-1]
    return f"{measured_on(last)}, {last['date'][:10]}, torch {last['torch']}, linconv {last['linconv']}"


def _run(run: dict) -> str:
    commit = (run["commit"] or "unknown")[:10] + (" with changes" if run["dirty"] else "")
    rates = "memory only"
    if run["rates"]:
        matmul = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s {name}" for name, rate in run["rates"]["matmul"].items())
        rates = f"torch.mm {matmul}, copy {run['rates']['copy'] / 1e9:.1f} GB/s"
    return (
        f"{run['platform']}; {run['cpu']}, {run['threads']} threads, instruction set {run['isa']}"
        + (f"; {run['gpu']}" if run["gpu"] else "")
        + f"; commit {commit}; torch {run['torch']}, transformers {run['transformers']}; seed {run['seed']}; {rates}"
    )


def _length(results: Results, case: str, length: float) -> str:
    description = results.cases[case]
    rate = description["units_per_second"]
    return f"{length:,.0f} {description['unit']}" + (f" ({plots.duration(length / rate)})" if rate else "")


def _crossover_row(results: Results, c: analysis.Crossover) -> list[str]:
    def say(length):
        if length is None:
            return f"not up to {_length(results, c.case, c.longest)}"
        if length <= c.shortest:
            return f"the shortest, {_length(results, c.case, c.shortest)}"
        return _length(results, c.case, length)

    mark = "~" if c.predicted else ""
    return [c.case, c.name, mark + say(c.length), f"{say(c.low)} to {say(c.high)}"]


def _losses(all_results: Sequence[Results]):
    titles = {
        "time": ("Slower", "times the time of"), "memory": ("More memory", "times the memory of"),
        "floor": ("Far above the floor", "times"),
    }  # fmt: skip
    for what, (title, times) in titles.items():
        rows = []
        for results in all_results:
            for loss in analysis.losses(results):
                if loss.what == what:
                    span = [_length(results, loss.case, n) for n in (loss.lengths[0], loss.lengths[-1])]
                    mark = "~" if loss.predicted else ""
                    rows.append((loss.ratio, [
                        loss.case, loss.name, f"up to {mark}{loss.ratio:.2f} {times} {loss.behind}",
                        span[0] if len(loss.lengths) == 1 else f"{span[0]} to {span[1]}",
                        _length(results, loss.case, loss.worst),
                    ]))  # fmt: skip
        yield "h3", title
        if rows:
            rows = [row for _, row in sorted(rows, key=lambda pair: -pair[0])]
            yield "text", ["case", "linconv", "", "within", "worst at"], rows
        else:
            yield "p", "Nowhere in these results."


def _latency_table(results: Results, case: str, series):
    description = results.cases[case]
    baseline = next((s for s in series if s.name == description["baseline"]), None)
    header = [f"latency, {description['unit']}", *(s.name for s in series)]
    rows = []
    for length in sorted({n for s in series for n in s.lengths}):
        cells = [_length(results, case, length)]
        for s in series:
            cell = ""
            if length in s.lengths:
                at = s.lengths.index(length)
                if s.seconds[at]:
                    mark = "~" if s.predicted[at] else ""
                    cell = f"{mark}{_seconds(s.seconds[at])}" + ("†" if s.composed[at] else "")
                    if s.batch[at]:
                        cell += f", {s.batch[at]} at once"
                    if baseline is not None and s.ours and (ratio := analysis.speedup(s, baseline).get(length)):
                        cell += f" ({ratio:.2f} ×)"
            cells.append(cell)
        rows.append(cells)
    powers = [analysis.growth(s) for s in series]
    rows.append(["grows with length to the power", *("" if p is None else f"{p:.2f}" for p in powers)])
    return header, rows


def _memory_table(results: Results, case: str, series):
    header = [f"peak memory, {results.cases[case]['unit']}", *(s.name for s in series)]
    rows = []
    for length in sorted({n for s in series for n in s.lengths}):
        cells = [_length(results, case, length)]
        for s in series:
            at = s.lengths.index(length) if length in s.lengths else None
            value = None if at is None else s.extra_bytes[at]
            cells.append("" if value is None else f"{'~' if s.bytes_predicted[at] else ''}{value / 2**20:,.1f} MiB")
        rows.append(cells)
    return header, rows


def _reasons(series):
    """The reasons why predicted values were not measured."""
    found: dict[str, list[str]] = {}
    for s in series:
        for length, why in zip(s.lengths, s.predicted):
            if why:
                found.setdefault(f"{s.name}: {why}", []).append(f"{length:,}")
    if found:
        text = "; ".join(f"{name} ({', '.join(lengths)})" for name, lengths in found.items())
        yield "p", f"Predicted (~): {text}."


def _seconds(value: float) -> str:
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    return f"{value * 1e3:,.1f} ms" if value < 1 else f"{value:,.2f} s"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# ---- Output


def _markdown(blocks) -> str:
    parts = []
    for kind, *content in blocks:
        if kind in ("h1", "h2", "h3"):
            parts.append("#" * int(kind[1]) + " " + content[0])
        elif kind == "p":
            parts.append(content[0])
        elif kind == "figure":
            parts.append(f"![{content[1]}]({_slug(content[1])}.png)")
        elif kind in ("table", "text"):
            header, rows = content
            rule = ["---"] + ["---:" if kind == "table" else "---"] * (len(header) - 1)
            parts.append("\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows)))
    return "\n\n".join(parts) + "\n"


def _html(blocks) -> str:
    parts = []
    for kind, *content in blocks:
        if kind in ("h1", "h2", "h3"):
            text = html.escape(content[0])
            parts.append(f'<{kind} id="{_slug(content[0])}">{text}</{kind}>')
        elif kind == "p":
            parts.append(f"<p>{html.escape(content[0])}</p>")
        elif kind == "contents":
            links = "".join(f'<li><a href="#{_slug(case)}">{html.escape(case)}</a></li>' for case in content[0])
            parts.append(f"<nav><ul>{links}</ul></nav>")
        elif kind == "figure":
            svg = _unique_ids(plots.case_svg(*content), _slug(content[1]))
            parts.append(f'<figure role="img" aria-label="{html.escape(content[1])}">{svg}</figure>')
        else:
            header, rows = content
            lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in header)]
            lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
            name = ' class="text"' if kind == "text" else ""
            parts.append(
                f'<div class="scroll"><table{name}>' + "".join(f"<tr>{x}</tr>" for x in lines) + "</table></div>"
            )
    title = html.escape(blocks[0][1])
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{_CSS}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _unique_ids(svg: str, prefix: str) -> str:
    """Make ids unique on a page of many figures: matplotlib numbers the elements of each from one."""
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(xlink:href|href)="#([^"]+)"', rf'\1="#{prefix}-\2"', svg)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
