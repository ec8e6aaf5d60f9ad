"""``linconv demo``: the whole pipeline from recorded speech to a linear-time model, with scores, speed and report."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from linconv.flags import Parser, above_zero, seed

__all__ = ["main"]

SHORTEST = 0.1  # seconds, for which the demo's model has a few frames


def main(argv: list[str] | None = None) -> int:
    """Runs the demo, or with ``--fetch`` only the download; returns the exit status."""
    options = _parser().parse_args(argv)
    from linconv.demo.fetch import FetchError, fetch
    from linconv.errors import UserError

    try:
        if options.fetch:
            print(fetch())
            return 0
        from linconv.demo.run import run

        run(options)
    except (FetchError, UserError) as error:
        print(f"linconv demo: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="linconv demo",
        description="Trains a small Wav2Vec2 on recorded speech, converts it to bidirectional Mamba-2, distils it in "
        "three modes, and measures both against the length of the audio.",
    )
    parser.add_argument("--fetch", action="store_true", help="only bring the recordings, and say where they are")
    parser.add_argument("--data", type=Path, metavar="DIR", help="an audio folder with metadata.csv, in their place")
    parser.add_argument("--label", default="language", help="column of metadata.csv to learn (default: language)")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for report and models (default: demo)")
    parser.add_argument(
        "--seed", type=seed, default=0, help="same seed, machine and versions: same scores (default: 0)"
    )
    parser.add_argument("--steps", type=above_zero(int), help="training steps of the teacher and of each student")
    parser.add_argument(
        "--lengths",
        type=_lengths,
        default=[5, 10, 30, 60, 120, 300, 600],
        metavar="SECONDS,...",
        help="lengths of audio to measure (default: 5,10,30,60,120,300,600)",
    )
    parser.add_argument(
        "--budget",
        type=above_zero(float),
        default=60,
        metavar="SECONDS",
        help="time to spend on timing, and again on memory; longer audio is predicted (default: 60)",
    )
    return parser


def _lengths(text: str) -> list[float]:
    """Parses lengths in seconds; returns them sorted, without duplicates, as curves need them."""
    try:
        lengths = sorted({float(part) for part in text.split(",")})
        if all(SHORTEST <= length < math.inf for length in lengths):
            return lengths
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"got {text!r}; want seconds from {SHORTEST} up, as 5,10,30")
