"""Tables: .csv, and .tsv as GLUE has it."""

import csv
import io
import sys
from pathlib import Path

from linconv.errors import UserError, first_of

__all__ = ["SEPARATORS", "decoded", "read_table"]

SEPARATORS = {".tsv": "\t", ".csv": ","}


def decoded(path: Path) -> str:
    """A file's text, its line ends as they are."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error}") from error


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table, by the columns that its first line names.

    Raises:
        UserError: it is not UTF-8, has no rows, names a column twice, or has rows of more or fewer columns.
    """
    tabs = path.suffix == ".tsv"  # GLUE's have quotation marks in their text, unpaired ones too
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # documents are longer than its 128 KB
    lines = csv.reader(
        io.StringIO(decoded(path), newline=""),
        delimiter=SEPARATORS[path.suffix],
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
    )
    columns = next(lines, [])
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise UserError(f"{path}: got two columns {twice[0]!r}; want one of that name")
    rows, ragged, end = [], [], lines.line_num
    for fields in lines:
        start, end = end + 1, lines.line_num  # a text in quotation marks may go over several lines
        if len(fields) == len(columns):
            rows.append(dict(zip(columns, fields)))
        elif fields:  # of a blank line there are none
            ragged.append(f"line {start} has {len(fields)}")
    if ragged:
        quoted = "" if tabs else ", and a text with a comma in quotation marks"
        raise UserError(
            f"{path}: the first line names {len(columns)} columns, but {first_of(ragged)}; want as many in each{quoted}"
        )
    if not rows:
        raise UserError(f"{path}: no rows in it")
    return rows
