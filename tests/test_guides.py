"""The pages that users read: links lead somewhere, commands parse, code is valid, sentences are short."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml
from typer.testing import CliRunner

from llmqat import cli
from llmqat.cli.application import COMMANDS
from llmqat.guides import REPOSITORY, TOPICS, for_terminal, guides
from llmqat.recipe.config import Recipe
from llmqat.recipe.schema import recipe_keys, recipe_schema
from tests.evaluate.test_scripts import SCRIPTS

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ("commands", "recipe-keys", "python-api")
PAGES = {
    **{file.relative_to(ROOT).as_posix(): file for name, file in guides().items() if name not in GENERATED},
    **{name: ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md")},
}
LONGEST_SENTENCE, MEAN_SENTENCE = 25, 16
"""Words."""
runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})


def fences(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def prose(text: str) -> str:
    """A page without code, tables and headings; code within a line is one word, and a link its words."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"^(\||#|    ).*$", "", text, flags=re.M)
    text = re.sub(r"`[^`]*`", "code", text)
    return re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)


def sentences(text: str) -> list[str]:
    items = re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.) ", prose(text), flags=re.M)
    found = [one for item in items for one in re.split(r"(?<=[.!?:;])\s+(?=[\w\"'(*])", " ".join(item.split()))]
    return [one for one in found if re.search(r"\w", one)]


def test_every_guide_is_there_and_listed() -> None:
    assert {file.stem for file in (ROOT / "llmqat" / "help").iterdir()} == set(TOPICS)
    output = runner.invoke(cli.app, ["help"]).output
    assert [line.split()[0] for line in output.splitlines() if line.startswith("  ")] == [*TOPICS]


@pytest.mark.parametrize("topic", [topic for topic in TOPICS if topic not in GENERATED])
def test_a_guide_is_short(topic: str) -> None:
    assert 60 <= len(guides()[topic].read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("topic", TOPICS)
def test_a_guide_is_printed_with_links_that_a_terminal_s_reader_can_use(topic: str) -> None:
    done = runner.invoke(cli.app, ["help", topic.upper()])
    assert done.exit_code == 0
    assert done.output.startswith("# ")
    assert "](" not in re.sub(r"`[^`]*`", "", re.sub(r"```.*?```", "", done.output, flags=re.S))


def test_links_become_commands_and_addresses() -> None:
    text = "See [data](data.md#mix), [a recipe](../../recipes/x.yaml), [below](#end), [PyPI](https://pypi.org)."
    assert for_terminal(text) == (
        f"See data (`llmqat help data`), a recipe ({REPOSITORY}/recipes/x.yaml), below, PyPI (https://pypi.org)."
    )


@pytest.mark.parametrize(
    ("topic", "message"),
    [
        ("instal", "did you mean 'install'?"),
        ("quantize", "llmqat quantize --help"),
        ("xyz", "choose one of quickstart"),
    ],
)
def test_a_topic_that_is_none_is_refused(topic: str, message: str) -> None:
    done = runner.invoke(cli.app, ["help", topic])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_what_is_made_from_code_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    import references

    made = references.pages()
    assert set(made) == set(GENERATED)
    behind = [topic for topic, text in made.items() if guides()[topic].read_text(encoding="utf-8") != text]
    assert behind == [], "run: python eval/references.py"


def test_tables_of_figures_are_what_the_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    import figures

    pages = {page: page.read_text(encoding="utf-8") for page in figures.PAGES}
    assert sum(len(figures.MARKED.findall(text)) for text in pages.values()) == len(figures.TABLES)
    behind = [page.name for page, text in pages.items() if figures.rendered(text) != text]
    assert behind == [], "run: make figures"


def anchors(file: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *(f"llmqat/help/{name}.md" for name in GENERATED), "eval/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    file = ROOT / page
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.M | re.S)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(REPOSITORY):
            place, _, anchor = target.removeprefix(f"{REPOSITORY}/").partition("#")
            found = ROOT / place
        elif "://" in target:
            continue
        else:
            place, _, anchor = target.partition("#")
            found = file.parent / place if place else file
        if not found.exists() or (anchor and anchor not in anchors(found)):
            broken.append(target)
    assert broken == []


def commands_of(text: str) -> list[list[str]]:
    """The words of each line of bash fences that is a command of llmqat, without what comes before and behind it."""
    lines = "\n".join(fences(text, "bash")).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        begins = [at for at, word in enumerate(words) if word == "llmqat" and (at == 0 or words[at - 1] == "-m")]
        if not begins:
            continue
        words = words[begins[0] + 1 :]
        ends = [place for place, word in enumerate(words) if word in ("|", "&&", ">")]
        found.append(words[: ends[0]] if ends else words)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page: str) -> None:
    group = typer.main.get_command(cli.app)
    keys = recipe_keys(recipe_schema())
    for name, *words in commands_of(PAGES[page].read_text(encoding="utf-8")):
        if name.startswith("--"):
            continue
        assert name in COMMANDS, name
        context = group.commands[name].make_context(name, list(words), resilient_parsing=False)  # type: ignore[attr-defined]
        for override in context.params.get("overrides") or ():
            key = override.partition("=")[0]
            assert key in keys or any(one.startswith(f"{key}.") for one in keys), f"{page}: {override}"


@pytest.mark.parametrize("page", PAGES)
def test_code_and_recipes_are_valid(page: str) -> None:
    text = PAGES[page].read_text(encoding="utf-8")
    for code in fences(text, "python"):
        compile(code, page, "exec")
    for block in fences(text, "yaml"):
        found = yaml.safe_load(block)
        assert isinstance(found, dict), block
        if set(found) <= set(Recipe.model_fields):
            Recipe.model_validate({"model": "MODEL", "output": "DIR", **found})


@pytest.mark.parametrize("page", PAGES)
def test_sentences_are_short(page: str) -> None:
    lengths = {one: len(one.split()) for one in sentences(PAGES[page].read_text(encoding="utf-8"))}
    assert [one for one, words in lengths.items() if words > LONGEST_SENTENCE] == []
    assert sum(lengths.values()) / len(lengths) <= MEAN_SENTENCE


OF_OTHERS = ("No such option: --KEY", "CUDA out of memory", "high precision", "It does not fit", "fp16=True is refused")
"""Messages of click and torch, and words that a message is put together of."""


def cited(page: str, part: str) -> list[Path]:
    """Files of results that a part of a page links to."""
    links = re.findall(r"\]\(([^)#]*eval/results/[^)#]+)\)", part)
    absolute = re.compile(r"https://.*?/main/(?=eval/results/)")
    return [
        ROOT / absolute.sub("", link) if absolute.match(link) else (PAGES[page].parent / link).resolve()
        for link in links
    ]


def test_pages_cite_files_of_results() -> None:
    found = {page: set(cited(page, file.read_text(encoding="utf-8"))) for page, file in PAGES.items()}
    assert all(file.is_file() for files in found.values() for file in files)
    assert len(found["README.md"]) >= 5
    assert sum(len(files) > 0 for files in found.values()) >= 8


@pytest.mark.parametrize("page", PAGES)
def test_a_figure_that_cites_a_file_of_results_is_in_it(page: str) -> None:
    """Decimals of a paragraph that links to results, or of a table beside one: rounded, or as percent, they are there.

    A short decimal is found by chance in a long file; this catches figures that changed and were not written again.
    """
    text = re.sub(r"<!-- figures.*?<!-- end -->", "", PAGES[page].read_text(encoding="utf-8"), flags=re.S)
    parts = ["", *re.split(r"\n\s*\n", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)), ""]
    wrong = []
    for number, part in enumerate(parts[1:-1], 1):
        around = parts[number - 1 : number + 2] if part.startswith("|") else [part]
        if not (files := [file for one in around for file in cited(page, one) if file.suffix != ".png"]):
            continue
        whole = " ".join(file.read_text(encoding="utf-8") for file in files)
        known = [float(one.replace(",", "")) for one in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?", whole)]
        said = re.sub(r"`[^`]*`", "", re.sub(r"\]\([^)]*\)", "]", part))
        for figure in re.findall(r"(?<![\w.])\d+\.\d+(?:e-?\d+)?(?![\w.]*\d)", said):
            digits = len(figure.partition("e")[0].partition(".")[2])
            form = f".{digits}e" if "e" in figure else f".{digits}f"
            if not any(f"{float(figure):{form}}" in (f"{one:{form}}", f"{100 * one:{form}}") for one in known):
                wrong.append((figure, [file.name for file in files]))
    assert wrong == []


def test_messages_of_the_troubleshooting_guide_are_in_the_code() -> None:
    """Their words between placeholders, which are capitals or quoted; strings over several lines are one."""
    files = sorted((ROOT / "llmqat").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?r?"', "", "\n".join(file.read_text(encoding="utf-8") for file in files))
    code = code.replace("{{", "{").replace("}}", "}")
    guide = guides()["troubleshooting"].read_text(encoding="utf-8").partition("## Command line")[2]
    messages = [one for cell in re.findall(r"^\| (`[^|]*) \|", guide, re.M) for one in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 50
    lost = []
    for message in messages:
        words = [piece.strip(" =") for piece in re.split(r"'[^']*'|\b[A-Z_]+\b|: ", message)]
        if message not in OF_OTHERS and any(piece not in code for piece in words if len(piece) > 3):
            lost.append(message)
    assert lost == []
