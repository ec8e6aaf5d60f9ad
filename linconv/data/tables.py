"""Tables: .csv, and .tsv in GLUE's form."""

import csv
import io
import sys
from pathlib import Path

from linconv.errors import UserError, first_of

__all__ = ["SEPARATORS", "decoded", "read_table"]

SEPARATORS = {".tsv": "\t", ".csv": ","}


def decoded(path: Path) -> str:
    """Returns the text of a UTF-8 file with its line ends unchanged."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error}") from error


def read_table(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a table as dictionaries by the column names in its first line.

    Raises:
        UserError: it is not UTF-8, has no rows, names a column twice, or has rows with more or fewer columns.
    """
    tabs = path.suffix == ".tsv"  # text in GLUE's tables has unpaired quotation marks
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # documents may exceed its default of 128 KB
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
        start, end = end + 1, lines.line_num  # quoted text may span several lines
        if len(fields) == len(columns):
            rows.append(dict(zip(columns, fields)))
        elif fields:  # a blank line has none
            ragged.append(f"line {start} has {len(fields)}")
    if ragged:
        quoted = "" if tabs else ", and a text with a comma in quotation marks"
        raise UserError(
            f"{path}: the first line names {len(columns)} columns, but {first_of(ragged)}; want as many in each{quoted}"
        )
    if not rows:
        raise UserError(f"{path}: no rows in it")
    return rows
