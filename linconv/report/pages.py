"""Files of a report: JSON, Markdown, and one HTML page with its figures."""

import base64
import html
import json
from pathlib import Path

import numpy as np

from linconv.report import statistics
from linconv.report.figures import curve_figure, score_figure, shift_figure, trajectory_figure, whose_shift
from linconv.report.runs import measure_of

__all__ = ["table", "write"]

NOTE = (
    "Means over seeds. Intervals: paired bootstrap over seeds and over the clips, sentences or blocks of the split "
    "({resamples:,} draws), student and teacher on the same draws."
)
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; } img { max-width: 100%; } .small { color: #555; font-size: .85rem; }
"""


def write(report: dict, folder: str | Path) -> Path:
    """Writes report.json, report.md and report.html; returns the path of report.html."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text(_markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(_page(report), encoding="utf-8")
    return folder / "report.html"


def table(report: dict) -> tuple[list[str], list[list[str]]]:
    header = ["mode", "seeds", f"{report['score']} [{report['level']:.0%}]", "to its teacher", "retained", "parameters"]
    percent = measure_of(report["score"]).percent
    score, scale, difference = (".1%", 100, "+.1f") if percent else (".2f", 1, "+.2f")
    cells = []
    for row in report["rows"]:
        low, high = row["interval"]
        line = [row["mode"], str(len(row["seeds"])), f"{row['score']:{score}} [{low:{score}}, {high:{score}}]"]
        if "difference" in row:
            low, high = row["difference_interval"]
            middle, low, high = (format(scale * x, difference) for x in (row["difference"], low, high))
            line.append(f"{middle} [{low}, {high}]" + (" points" if percent else ""))
            if row["retained"] is None:  # the teacher gets nothing right
                line.append("-")
            else:
                least, most = row["retained_interval"]
                line.append(f"{row['retained']:.1%} [{least:.1%}, {most:.1%}]")
        else:
            line += ["", ""]
        cells.append([*line, f"{row['parameters']:,}"])
    return header, cells


def _note() -> str:
    return NOTE.format(resamples=statistics.RESAMPLES)


def _last_values(report: dict) -> list[str]:
    lines = []
    for curve in report["curves"]:
        mse, cosine = np.mean(curve["layer_mse"][-1]), np.mean(curve["layer_cosine"][-1])
        lines.append(f"{curve['mode']}, seed {curve['seed']}: MSE {mse:.3g}, cosine {cosine:.3f}, mean over layers")
    return lines


def _provenance(report: dict) -> str:
    def shown(value) -> str:
        return " and ".join(map(str, value)) if isinstance(value, list) else str(value)

    return ", ".join(f"{k} {shown(v)}" for k, v in report["provenance"].items() if v is not None)


def _markdown(report: dict) -> str:
    header, rows = table(report)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    parts = [f"# {report['title']}", text, _note()]
    if report["curves"]:
        parts += ["## Hidden states at the last record", "\n".join(f"- {line}" for line in _last_values(report))]
    if report["feature_shift"]:
        shifts = [f"- {whose_shift(shift)}: {shift['advice']}" for shift in report["feature_shift"]]
        parts += ["## Feature shift of the fine-tuning", "\n".join(shifts)]
    parts += ["## Provenance", _provenance(report) + f"; written {report['made']}"]
    return "\n\n".join(parts) + "\n"


def _page(report: dict) -> str:
    header, rows = table(report)

    def cells(line, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>"

    body = [f"<h1>{html.escape(report['title'])}</h1>"]
    body.append("<table>" + cells(header, "th") + "".join(cells(row, "td") for row in rows) + "</table>")
    body.append(f'<p class="small">{html.escape(_note())}</p>')
    figures = (
        ("Scores", score_figure(report)),
        ("Hidden states against step", curve_figure(report)),
        ("Trajectories of the hidden states", trajectory_figure(report)),
        ("Feature shift of the fine-tuning", shift_figure(report)),
    )
    for title, figure in figures:
        if figure is not None:
            image = base64.b64encode(figure).decode()
            body.append(f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{image}">')
    for shift in report["feature_shift"]:
        whose = whose_shift(shift)
        body.append(f"<p>{html.escape(whose[0].upper() + whose[1:])}: {html.escape(shift['advice'])}</p>")
    card = html.escape(json.dumps(report["model_card"], indent=1))
    body.append(f"<h2>Model card metadata</h2><details><summary>JSON</summary><pre>{card}</pre></details>")
    body.append(f'<p class="small">{html.escape(_provenance(report))}; written {report["made"]}</p>')
    head = f'<meta charset="utf-8"><title>{html.escape(report["title"])}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'
