"""The language of the project: words that the glossary replaces do not come back, and no docstring is a fragment.

A use that is right, such as the environment variable HOME, stands in tests/prose_allowed.txt: path :: text :: why.
"""

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SEARCHED = ("src", "docs", "examples", "benchmarks", "tests", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile")
ALLOWED = ROOT / "tests" / "prose_allowed.txt"
OWN_FILES = (ALLOWED, Path(__file__).resolve())
"""The two files that name the words themselves."""

# A word is a whole word or a whole part of an identifier: law, Law1, the_law, TheLaw, but neither flaw nor lawn.
GAP = r"[\s_#-]+"  # between the parts of a phrase, which may go on in the next line of a comment
WORDS = (
    "laws?", "trade[sd]?", "trading", "crowd(?:s|ed)?", "homes?", "dear(?:er|est|ly)?", "said", "told",
    f"put(?:s|ting)?{GAP}away", f"let(?:s|ting)?{GAP}go", "stand[-_]?ins?",
)  # fmt: skip
LOWER = re.compile(rf"(?<![A-Za-z])(?:{'|'.join(WORDS)})(?![a-z])", re.IGNORECASE)
CAMEL = re.compile(r"(?<![A-Z])(?:Laws?|Trade[sd]?|Crowds?|Homes?|Dear|Said|Told|PutAway|LetGo|StandIns?)(?![a-z])")


def old_words(text: str) -> list[tuple[int, str]]:
    """The (line number from 0, word) of every old word in ``text``."""
    found = [match for pattern in (LOWER, CAMEL) for match in pattern.finditer(text)]
    return sorted((text.count("\n", 0, match.start()), match.group()) for match in found)


def searched_files() -> Iterator[Path]:
    for name in SEARCHED:
        place = ROOT / name
        files = [place] if place.is_file() else sorted(place.rglob("*"))
        yield from (
            path
            for path in files
            if path.is_file() and path not in OWN_FILES and path.suffix in ("", ".py", ".md", ".svg", ".txt", ".toml", ".json")
        )


def allowed() -> list[tuple[str, str, str]]:
    """The entries (path, text in one of its lines, why) of the allow-list."""
    rows = [row for row in ALLOWED.read_text().splitlines() if row and not row.startswith("#")]
    return [(path, text, why) for path, text, why in (row.split(" :: ") for row in rows)]


@pytest.mark.parametrize(
    "text",
    ["the law holds", "Law1", "LAW_2", "TheLaw", "laws", "trades", "a_trade", "Crowd", "$HOME", "at home", "dearer", "said0",
     "_told", "is put away", "put\n    # away", "let_go", "lets go", "stand-in", "StandIn", "stand_ins", "PutAway", "aHome"],
)  # fmt: skip
def test_a_word_is_found_in_prose_and_in_identifiers(text: str) -> None:
    assert len({line for line, _ in old_words(f"{text}\n")}) == 1


@pytest.mark.parametrize(
    "text", ["flaw", "lawn", "homepage", "Homepage", "stand in the order", "standing", "letting", "unsaid"]
)
def test_longer_words_are_not_found(text: str) -> None:
    assert old_words(text) == []


def test_no_old_word_is_used() -> None:
    found = []
    for path in searched_files():
        name, text = str(path.relative_to(ROOT)), path.read_text()
        lines = text.splitlines()
        for _, right, _ in (entry for entry in allowed() if entry[0] == name):
            text = text.replace(right, "-" * len(right))
        found += [f"{name}:{number + 1}: {word!r} in {lines[number].strip()}" for number, word in old_words(text)]
    assert not found, "\n" + "\n".join(found) + "\nuse the terms of docs/glossary.md (CONTRIBUTING.md, Rules)"


def test_every_entry_of_the_allow_list_gives_a_reason_and_is_needed() -> None:
    for path, text, why in allowed():
        assert len(why.split()) > 2, f"{path}: {text}: give the reason"
        assert text in (ROOT / path).read_text(), f"{path} does not hold {text!r}: remove the entry"
        assert old_words(text), f"{path}: {text!r} has no old word: remove the entry"


def docstrings() -> Iterator[tuple[str, str]]:
    """(file and line, text) of every docstring of src, and of every string that stands below an assignment."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node.value.value


def test_every_file_begins_with_a_sentence_about_what_it_is() -> None:
    for path in sorted((ROOT / "src").rglob("*.py")):
        text = path.read_text()
        if text.strip():
            first = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
            assert first.endswith((".", ":")), f"{path.relative_to(ROOT)} begins with {first!r}"


def test_no_docstring_is_a_fragment_that_begins_with_of() -> None:
    fragments = [f"{place}: {text}" for place, text in docstrings() if text.startswith("Of ")]
    assert not fragments, "\n" + "\n".join(fragments)


def test_the_places_that_contributing_names_exist() -> None:
    """A row names its file in the second column; tensor and pipeline parallelism are not built yet and say so."""
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where does X go?")[2].partition("\n## ")[0]
    rows = [row.split(" | ") for row in table.splitlines() if row.startswith(("| a ", "| tensor ", "| pipeline "))]
    assert len(rows) == 9
    for what, places, takes, command in rows:
        for place in re.findall(r"`(src/longspan/\S+)`", places):
            exists = (ROOT / place.replace("NAME.py", "")).exists()
            assert exists != ("not built yet" in takes), f"{what}: {place}"
        grep = re.search(r"`(grep .+)`", command)
        assert grep is not None, what
        found = subprocess.run(shlex.split(grep.group(1)), cwd=ROOT, capture_output=True, text=True, check=False)
        assert found.stdout, f"{what}: {grep.group(1)} finds nothing"


def test_the_tests_that_the_docs_name_exist() -> None:
    for path in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for named in re.findall(r"\btests/[a-z_/]+\.(?:py|txt)", path.read_text()):
            assert (ROOT / named).exists(), f"{path.name} names {named}"
