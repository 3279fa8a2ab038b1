"""The Python blocks of README.md and docs/*.md run; a page is one program, with the same output on one rank and on two."""

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from tests.helpers.ranks import Ranks

ROOT = Path(__file__).parent.parent
IMPORTED = (LlamaForCausalLM,)  # once here, instead of in every rank
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = {
    str(p.relative_to(ROOT)): BLOCK.findall(p.read_text()) for p in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}

FRAGMENTS: dict[tuple[str, str], str] = {}
"""Blocks that do not run, by page and first line, with the reason."""

ONE_RANK = {
    ("README.md", "from longspan import Causal, Documents, SinkTokens, Window, attend"): "its q has the tokens of a whole row"
}
"""Blocks that mean something on one rank only, by page and first line, with the reason."""


def _program(page: str, ranks: int) -> str:
    left_out = FRAGMENTS if ranks == 1 else FRAGMENTS | ONE_RANK
    return "\n".join(block for block in PAGES[page] if (page, block.splitlines()[0]) not in left_out)


@pytest.mark.parametrize("page", [page for page, blocks in PAGES.items() if blocks])
def test_the_code_of_a_page_runs_alike_on_one_rank_and_on_two(page: str, pool: Callable[[int], Ranks]) -> None:
    (alone,) = pool(1).run(_printed, _program(page, 1), page)
    first, second = pool(2).run(_printed, _program(page, 2), page)
    losses = [float(number) for number in re.findall(r"\d+\.\d+", alone)]
    assert losses, "the page prints no number that could be compared"
    assert [float(number) for number in re.findall(r"\d+\.\d+", first)] == pytest.approx(losses, rel=2e-4)
    assert not second, "rank 0 alone prints"


def test_howto_resumes_with_the_same_losses(pool: Callable[[int], Ranks]) -> None:
    first, _ = pool(2).run(_printed, _program("docs/howto.md", 2), "docs/howto.md")
    losses = re.findall(r"\d+\.\d+", first)
    assert len(losses) == 6
    assert losses[2:4] == losses[4:6] != losses[0:2]


def test_exceptions_name_blocks_that_are_there() -> None:
    there = {(page, block.splitlines()[0]) for page, blocks in PAGES.items() for block in blocks}
    assert set(FRAGMENTS | ONE_RANK) <= there


def test_links_between_pages_lead_somewhere() -> None:
    pages = [ROOT / page for page in PAGES] + [ROOT / "CONTRIBUTING.md"]
    broken = [
        f"{page.name}: {link}"
        for page in pages
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
        if not (page.parent / link).exists()
    ]
    assert not broken


def _printed(code: str, page: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, page, "exec"), {"__name__": "__main__"})
    return out.getvalue()
