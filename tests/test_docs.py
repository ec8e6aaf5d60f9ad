"""What the documentation says can be run: examples, command lines, and links."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "recipes/README.md", *ROOT.glob("docs/**/*.md")])
# Pages whose examples need no network and take no time.
RUN = ("ops.md", "padding.md")


def blocks(page, *languages):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [code for language, code in found if language in languages]


@pytest.mark.parametrize("name", RUN)
def test_examples_run(name):
    """All of a page, one behind the other."""
    page, names = ROOT / "docs" / name, {}
    found = blocks(page, "python")
    assert found
    for number, code in enumerate(found):
        exec(compile(code, f"{name}, example {number + 1}", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_are_python(page):
    for number, code in enumerate(blocks(page, "python")):
        compile(code, f"{page.name}, example {number + 1}", "exec")


def commands(page):
    """The `linconv` command lines of the shell blocks, continued lines joined."""
    for block in blocks(page, "", "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("linconv "):
                yield shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_understood(page):
    """Every command, flag and recipe key that is shown is there."""
    pytest.importorskip("transformers")
    from linconv import cli, demo

    for words in commands(page):
        if words[0] == "demo":
            demo._parser().parse_args(words[1:])
            continue
        parser = cli._build_parser()
        parsed = parser.parse_args(words)
        if hasattr(parsed, "recipe"):
            if parsed.recipe is not None:
                parsed.recipe = ROOT / parsed.recipe
            cli._recipe(parsed)


def test_there_are_commands_to_understand():
    assert sum(1 for page in PAGES for _ in commands(page)) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}, target


def test_every_operator_is_in_the_reference():
    from linconv import ops

    text = (ROOT / "docs/ops.md").read_text(encoding="utf-8")
    for name in ops.__all__:
        assert f"`{name}`" in text or f"`ops.{name}()`" in text, name


def test_every_key_and_flag_is_in_the_command_line_page():
    """Flags of the parser, and keys of a recipe by their names."""
    import dataclasses

    from linconv import cli
    from linconv.recipe import Recipe, _hints

    text = "".join((ROOT / f"docs/{page}.md").read_text(encoding="utf-8") for page in ("cli", "benchmarks"))
    words = set(re.findall(r"[\w-]+", text))
    for command in cli._build_parser().command_parsers.values():
        for flag in command._option_string_actions:
            assert flag in text or flag in ("-h", "--help"), flag
    for name, hint in _hints(Recipe).items():
        assert name in words, name
        if dataclasses.is_dataclass(hint):
            assert not {f.name for f in dataclasses.fields(hint)} - words, name
