"""Reports that compare runs of ``linconv finetune`` and ``linconv distill``: JSON, Markdown and one HTML page."""

from linconv.report.content import build
from linconv.report.pages import table, write
from linconv.report.runs import RunFolder, read_run

__all__ = ["RunFolder", "build", "read_run", "table", "write"]
