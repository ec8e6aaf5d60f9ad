"""User errors, reported in one line."""

import os
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path


class UserError(Exception):
    """A wrong path, name or value. The command line prints its message and exits with status 2."""


def unknown(what: str, got: object, known: Iterable[str]) -> UserError:
    """Makes the error for a name that is not in ``known``; it suggests the nearest one."""
    known = sorted(str(name) for name in known)
    near = get_close_matches(str(got), known, 1, cutoff=0.5)
    if near:
        return UserError(f"{what}: no {str(got)!r}; did you mean {near[0]!r}?")
    listed = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return UserError(f"{what}: no {str(got)!r}; known: {listed or 'none'}")


def no_folder(what: str, path: str) -> UserError:
    """Makes the error for a missing folder; it suggests the nearest name beside it."""
    parent = Path(path).parent
    beside = [str(p) for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    near = get_close_matches(path.rstrip("/"), beside, 1, cutoff=0.5)
    return UserError(f"{what}: no folder {path!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def first_of(mistakes: Sequence[str], most: int = 3) -> str:
    """Joins mistakes into one line: the first ones, and the number of others."""
    more = len(mistakes) - most
    return "; ".join(mistakes[:most]) + (f"; and {more:,} more" if more > 0 else "")


def check_output(output: str, what: str, **inputs: str | None) -> None:
    """Raises UserError if a folder cannot be written to, or is also one of the inputs."""
    if not output:
        raise UserError(f"{what}: got ''; want a folder")
    # A broken link counts as existing: no folder can be created in its place.
    there = next(p for p in (Path(output), *Path(output).absolute().parents) if p.exists() or p.is_symlink())
    if not there.is_dir():
        raise UserError(f"{what}: {there} is a {'file' if there.exists() else 'link to nothing'}; want a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{what}: {there} may not be written to; want another folder")
    for name, path in inputs.items():
        if path is not None and Path(path).is_dir() and Path(path).resolve() == Path(output).resolve():
            raise UserError(f"{what}: {output} is {name.replace('__', '.')} too, which would be overwritten")


def may_be_on_hub(path: str) -> bool:
    """Whether a path that is not a local folder can be a name on the hub: ``name`` or ``owner/name``."""
    parts = Path(path).parts
    return len(parts) <= 2 and not path.startswith((".", "/", "~")) and (len(parts) == 1 or not Path(parts[0]).is_dir())
