"""The command line: ``linconv inspect | convert | finetune | distill | eval | report | bench | demo | env``."""

import contextlib
import json
import os
import re
import sys
from pathlib import Path

from linconv.errors import UserError, check_output, unknown
from linconv.flags import Parser, above_zero, seed

__all__ = ["main"]

# flag, recipe key, type, help
_RECIPE_FLAGS = (
    ("--task", "task", str, "classification, ctc, text_classification or language_modeling"),
    ("--data", "data.path", str, "folder with tables or text, or a data set on the hub"),
    ("--label", "data.label", str, "column of the classes"),
    ("--text", "data.text", str, "column of the transcripts, or of the documents"),
    ("--sentence", "data.sentence", str, "column of the sentences"),
    ("--source", "model.source", str, "pretrained checkpoint"),
    ("--teacher", "model.teacher", str, "fine-tuned checkpoint: written by finetune, read by distill"),
    ("--output", "output", str, "folder for the student"),
    ("--mixer", "conversion.mixer", str, "what takes attention's place"),
    ("--layers", "conversion.layers", str, "which layers, as 0,1,5 or 0-5, =-1 for the last; all or none"),
    ("--mode", "guide.name", str, "unguided, target_guided, trajectory_guided, waypoint_guided or hybrid"),
    ("--seed", "seed", int, "seed of every random draw"),
)
# Flags that a command rejects because they have no effect on it. Recipes may have their keys, as they serve all.
_WITHOUT_EFFECT = {
    "finetune": {"--output", "--mixer", "--layers", "--mode"},
    "distill": set(),
    "eval": {"--source", "--teacher", "--output", "--mixer", "--layers", "--mode", "--seed"},
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 for a user error, which it prints in one line.

    It returns 130 if interrupted and 141 if its output is no longer read, as with ``| head``: the statuses that shells
    report for SIGINT and SIGPIPE.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    with contextlib.suppress(AttributeError):  # programs may replace stdout by objects without it
        sys.stdout.reconfigure(errors="backslashreplace")  # names that a terminal cannot show must not end a run
    try:
        if argv[:1] == ["demo"]:  # has its own parser
            from linconv.demo import main as demo

            return demo(argv[1:]) or 0
        parser = _build_parser()
        if argv and not argv[0].startswith("-") and argv[0] not in parser.command_parsers:
            raise unknown("command", argv[0], parser.command_parsers)
        arguments = parser.parse_args(argv)
        if arguments.command is None:
            parser.print_help()
            return 0
        status = arguments.run(arguments) or 0
        sys.stdout.flush()  # here, where errors of writing are handled
        return status
    except UserError as error:
        # A DataLoader worker passes on its whole traceback, which ends in the message.
        print(f"linconv: error: {str(error).strip().rpartition('UserError: ')[2]}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:  # operators and mixers need fewer packages than commands
        package = (error.name or "linconv").partition(".")[0]
        if package == "linconv":
            raise
        brings = "pip install 'linconv[models]' brings what commands need"
        print(f"linconv: error: {package} is not installed; {brings}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("linconv: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes the rest at exit
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        print(f"linconv: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2


def _build_parser() -> Parser:
    from linconv._version import __version__

    parser = Parser(prog="linconv", description="Pretrained transformers to linear-time sequence mixers.")
    parser.add_argument("--version", action="version", version=f"linconv {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, run, text: str) -> Parser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    text = "What a conversion would swap, or has swapped; the parameters, and the operations by length."
    sub = command("inspect", _inspect, text)
    _add_model_flags(sub)

    sub = command(
        "convert", _convert, "Convert a checkpoint and save it, mixers untrained. `distill` does this by itself."
    )
    _add_model_flags(sub)
    sub.add_argument("--output", required=True, help="folder for the converted checkpoint")
    sub.add_argument("--seed", type=seed, default=0, help="seed of the mixers' weights (default 0)")

    for name, run, text in (
        ("finetune", _finetune, "Fine-tune a teacher: classes of clips or sentences, CTC, or language modelling."),
        ("distill", _distill, "Convert a fine-tuned teacher and distil it into the result."),
    ):
        sub = command(name, run, text)
        _add_recipe_flags(sub, name)
        sub.add_argument("--steps", type=above_zero(int), help="optimizer steps")
        sub.add_argument("--lr", type=above_zero(float), help="learning rate")
        sub.add_argument("--batch", type=above_zero(int), help="clips, sentences or blocks a batch, on each device")
        sub.add_argument("--resume", action="store_true", help="go on from the last checkpoint of this run")
        sub.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, and stop")

    sub = command("eval", _eval, "Score a checkpoint: accuracy, word and character error rate, or perplexity.")
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a teacher or a student")
    _add_recipe_flags(sub, "eval")
    sub.add_argument(
        "--split", choices=("train", "validation", "test"), default="test", help="split to score (default test)"
    )
    sub.add_argument("--json", action="store_true", help="print the scores as JSON")

    sub = command("report", _report, "Finished runs side by side: report.json, report.md and report.html.")
    sub.add_argument("runs", metavar="RUN", nargs="+", help="output folder of a finished finetune or distill")
    sub.add_argument("--output", default="report", help="folder for the report (default report)")
    sub.add_argument("--title", default="Distillation runs", help="its headline")

    from linconv.benchmarking.command import add_arguments

    add_arguments(command("bench", _bench, "Latency, memory and crossover, measured, reported and compared."))
    command(
        "demo",
        None,
        "The whole pipeline on recorded speech: teacher, students, scores, speed. See `linconv demo --help`.",
    )
    command("env", _env, "Versions, the machine, the backends found, and why others are not.")
    parser.command_parsers = commands.choices
    return parser


def _add_model_flags(sub: Parser) -> None:
    sub.add_argument("model", metavar="MODEL", help="checkpoint folder, or model on the hub")
    sub.add_argument("--mixer", help="what takes attention's place (default bimamba2)")
    sub.add_argument("--layers", help="layers to convert: 0,1,5 or 0-5 (--layers=-1: the last), all (default) or none")
    _add_set(sub, "an option of the mixer, such as d_state=64")


def _add_recipe_flags(sub: Parser, command: str) -> None:
    sub.add_argument("recipe", metavar="RECIPE", nargs="?", help="YAML file; the flags below override its keys")
    for flag, key, kind, text in _RECIPE_FLAGS:
        if flag not in _WITHOUT_EFFECT[command]:
            sub.add_argument(flag, type=kind, help=f"{text} [{key}]")
    _add_set(sub, "any key of the recipe, such as distill.alpha_ld=15")


def _add_set(sub: Parser, text: str) -> None:
    sub.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help=text)


# ---- Commands


def _inspect(arguments) -> None:
    from linconv.conversion import inspect
    from linconv.pipeline import empty_model, positions

    model = empty_model(arguments.model, "model")
    found = _checked_conversion(inspect, model, arguments)
    print(found)
    limit = positions(model.config)
    if limit is not None and max(found.flops) > limit:
        print(
            f"  beyond {limit:,} {found.unit} these are operations only: the model has positions for no more, and "
            "takes longer input in pieces, or with positions added and trained"
        )


def _convert(arguments) -> None:
    import transformers

    from linconv.conversion import convert
    from linconv.pipeline import load_model, save_preprocessing

    _only_our_bars()
    check_output(arguments.output, "--output", MODEL=arguments.model)
    output = Path(arguments.output)
    if output.is_dir() and any(output.iterdir()):  # a trained student, say, would be half overwritten
        raise UserError(f"--output: {output} is not empty; want a new folder, or an empty one")
    model = load_model(arguments.model, "model")
    transformers.set_seed(arguments.seed)
    converted = _checked_conversion(convert, model, arguments)
    converted.save_pretrained(arguments.output)
    save_preprocessing(arguments.model, arguments.output)
    before, after = model.num_parameters(), converted.num_parameters()
    print(f"{type(converted).__name__}: {before:,} -> {after:,} parameters, saved in {arguments.output}")


def _checked_conversion(function, model, arguments):
    from linconv import mixers

    given = {} if arguments.mixer is None else {"mixer": arguments.mixer}
    mixer = given.get("mixer", "bimamba2")
    if mixer not in mixers.names():
        raise unknown("--mixer", mixer, mixers.names())
    known, options = mixers.get(mixer).options(), dict(map(_key_value, arguments.set))
    for key in options:
        if key not in known:
            raise unknown(f"--set {key}", key, known)
    try:
        return function(model, **given, layers=_layers(arguments.layers), **options)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error


def _finetune(arguments) -> None:
    _train("finetune", arguments)


def _distill(arguments) -> None:
    _train("distill", arguments)


def _train(name: str, arguments) -> None:
    from contextlib import nullcontext
    from tempfile import TemporaryDirectory

    overrides = [(f"{name}.{key}", getattr(arguments, flag)) for flag, key in _TRAINING_FLAGS.items()]
    recipe = _recipe(arguments, [(key, value) for key, value in overrides if value is not None])

    from linconv import pipeline

    _only_our_bars()
    # A dry run checks everything that a run does, and leaves no files.
    with TemporaryDirectory() if arguments.dry_run else nullcontext() as folder:
        run = getattr(pipeline, name)(recipe, folder)
        if arguments.dry_run:
            run.check(arguments.resume)
        if run.trainer.is_world_process_zero():
            _print_table(run.describe())
        if arguments.dry_run:
            return
    scores = run.execute(resume=arguments.resume)
    if run.trainer.is_world_process_zero():
        _print_table([(key, f"{value:.4f}") for key, value in scores.items()])
    run.trainer.leave_process_group()


_TRAINING_FLAGS = {"steps": "max_steps", "lr": "learning_rate", "batch": "per_device_train_batch_size"}


def _eval(arguments) -> None:
    recipe = _recipe(arguments)

    from linconv.pipeline import evaluate

    _only_our_bars()
    scores = evaluate(arguments.checkpoint, recipe, arguments.split)
    if arguments.json:
        print(json.dumps(scores))
    else:
        _print_table([(k, f"{v:.4f}" if isinstance(v, float) else str(v)) for k, v in scores.items()])


def _report(arguments) -> None:
    from linconv import report

    check_output(arguments.output, "--output")
    made = report.build(arguments.runs, arguments.title)
    page = report.write(made, arguments.output)
    header, rows = report.table(made)
    _print_table([(row[0], "  ".join(filter(None, row[1:]))) for row in [header, *rows]])
    print(f"written to {page}")


def _bench(arguments) -> int:
    from linconv.benchmarking.command import main

    return main(arguments)


def _env(arguments) -> None:
    from linconv.environment import report

    print(report())


# ---- Flags


def _recipe(arguments, overrides=()):
    from linconv.recipe import load_recipe

    given = [(key, getattr(arguments, flag[2:], None)) for flag, key, *_ in _RECIPE_FLAGS]
    given = [(k, _layers(v) if k == "conversion.layers" else v) for k, v in given if v is not None]
    return load_recipe(arguments.recipe, [*given, *overrides, *map(_key_value, arguments.set)])


def _key_value(text: str) -> tuple:
    from linconv.recipe import read_yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set: got {text!r}; want KEY=VALUE")
    try:
        return key, read_yaml(value)
    except ValueError as error:
        raise UserError(f"--set {key}: not a YAML value: {value!r}") from error


def _layers(text: str | None) -> list[int] | None:
    """Parses 0,1,5 or 0-5 into a list, with -1 for the last layer as in conversion.layers; None for all."""
    if text in (None, "all"):
        return None
    if text == "none":
        return []
    # Four digits at most: no model has more layers, and the list of a longer range may exhaust memory.
    found = [re.fullmatch(r"(-?\d{1,4})(?:-(-?\d{1,4}))?", part) for part in text.replace(" ", "").split(",")]
    ranges = [(int(part[1]), int(part[2] or part[1])) for part in found if part]
    # A descending range would be empty; one from below 0 to 0 or above would wrap from the last layers to the first.
    if None in found or any(first > last or first < 0 <= last for first, last in ranges):
        raise UserError(f"--layers: got {text!r}; want such as 0,1,5 or 0-5, -1 for the last, or all, or none")
    return [i for first, last in ranges for i in range(first, last + 1)]


def _only_our_bars() -> None:
    """Disables the progress bars of transformers for reading and writing weights; that of training stays."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _print_table(rows: list[tuple[str, str]]) -> None:
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    sys.exit(main())
