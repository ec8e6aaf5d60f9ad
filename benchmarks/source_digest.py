"""What tells a committed table of builds which sources it is of, so that CI sees one that was left behind."""

import hashlib
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = re.compile(r'^#include "(.+)"', re.MULTILINE)
CPP_COMMENT = re.compile(r'//[^\n]*|/\*.*?\*/|("(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\')', re.DOTALL)


def digest(*patterns: str) -> str:
    """Of the files that the patterns name, from the repository's root, and what they include of csrc: their paths and
    code, without comments and docstrings."""
    found = hashlib.sha256()
    for path in sorted(_with_included({path for pattern in patterns for path in ROOT.glob(pattern)})):
        found.update(f"{path.relative_to(ROOT).as_posix()}\n{code_of(path)}\n".encode())
    return found.hexdigest()[:16]


def code_of(path: Path) -> str:
    """The file without comments, docstrings, blank lines and space at the ends of lines."""
    text = path.read_text()
    text = _without_python_comments(text) if path.suffix == ".py" else CPP_COMMENT.sub(lambda m: m[1] or " ", text)
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def _without_python_comments(text: str) -> str:
    lines = text.splitlines(keepends=True)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type != tokenize.NL]
    spans = [(token.start, token.end) for token in tokens if token.type == tokenize.COMMENT]
    tokens = [token for token in tokens if token.type != tokenize.COMMENT]
    for before, token, after in zip([None, *tokens], tokens, tokens[1:]):
        begins = before is None or before.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        if token.type == tokenize.STRING and begins and after.type == tokenize.NEWLINE:  # a statement of its own
            spans.append((token.start, token.end))
    for (first, start), (last, end) in sorted(spans, reverse=True):
        lines[first - 1 : last] = [lines[first - 1][:start] + lines[last - 1][end:]]
    return "".join(lines)


def _with_included(paths: set[Path]) -> set[Path]:
    known, new = set(), paths
    while new:
        known |= new
        names = {name for path in new if path.suffix in (".cu", ".h") for name in INCLUDE.findall(path.read_text())}
        new = {path for name in names if (path := ROOT / "csrc" / name).exists()} - known  # not those of the tests
    return known


def told_by(table: Path) -> str:
    """The digest that a table says it is of, or ""."""
    match = re.search(r"sources `(\w+)`", table.read_text()) if table.exists() else None
    return match[1] if match else ""
