"""What tells a committed table of builds which sources it is of, so that CI sees one that was left behind."""

import hashlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = re.compile(r'^#include "(.+)"', re.MULTILINE)


def digest(*patterns: str) -> str:
    """Of the files that the patterns name, from the repository's root, and what they include of csrc: their paths and
    contents."""
    found = hashlib.sha256()
    for path in sorted(_with_included({path for pattern in patterns for path in ROOT.glob(pattern)})):
        found.update(f"{path.relative_to(ROOT).as_posix()}\n".encode() + path.read_bytes())
    return found.hexdigest()[:16]


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
