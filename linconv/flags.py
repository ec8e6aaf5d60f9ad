"""What the command lines share: a parser with one-line errors, and types of flag values."""

import argparse
import math
from collections.abc import Callable
from difflib import get_close_matches

__all__ = ["Parser", "above_zero", "seed"]


class Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line, with the nearest flag, or the commands that accept the flag."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_args(self, args=None, namespace=None):
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            parser = self.command_parsers.get(getattr(parsed, "command", None), self)
            flag = rest[0].split("=")[0]
            near = get_close_matches(flag, parser._option_string_actions, 1)
            others = [name for name, other in self.command_parsers.items() if flag in other._option_string_actions]
            hint = f"; it is taken by {', '.join(others)}" if others else f"; did you mean {near[0]!r}?" if near else ""
            parser.error(f"no argument {flag!r}{hint}")
        return parsed

    command_parsers: dict = {}


def above_zero(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """Returns the type of a flag that accepts finite numbers of this kind above 0."""

    def read(text: str) -> int | float:
        try:
            value = kind(text)
            if 0 < value < math.inf:
                return value
        except ValueError:
            pass
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"got {text!r}; want {what} above 0")

    return read


def seed(text: str) -> int:
    """The type of a flag that seeds every generator: NumPy's accepts 32 bits."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"got {text!r}; want a whole number from 0 to {2**32 - 1}")
    return int(text)
