"""The table writer: one section of a page is replaced, a refusal is a row, cells keep the table whole."""

from pathlib import Path

import pytest

from benchmarks.peers import page


def test_a_section_is_replaced_and_the_rest_of_the_page_is_left(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("# A\n\n<!-- a -->\nold\n<!-- /a -->\n\n<!-- b -->\nkept \\1\n<!-- /b -->\n")
    page.write("a", page.Section(text="new \\1\n\n"), path)
    assert path.read_text() == "# A\n\n<!-- a -->\nnew \\1\n<!-- /a -->\n\n<!-- b -->\nkept \\1\n<!-- /b -->\n"
    with pytest.raises(ValueError, match="no section 'c'"):
        page.write("c", page.Section(text="text"), path)


def test_a_figure_is_written_beside_the_page_and_shown_above_the_table(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("<!-- a -->\nold\n<!-- /a -->\n")
    page.write("a", page.Section(text="table", figure="<svg/>"), path)
    assert path.read_text() == "<!-- a -->\n![a](page-a.svg)\n\ntable\n<!-- /a -->\n"
    assert (tmp_path / "page-a.svg").read_text() == "<svg/>"


def test_a_refusal_is_a_row_as_wide_as_the_table() -> None:
    row = page.refusal_row("peer", "RuntimeError: a | b\nsecond line", 4)
    text = page.table(["", "time", "ratio", "right"], [["ours", "1 s", "1.00", "yes"], row])
    assert text.splitlines()[-1] == "| peer | cannot: RuntimeError: a / b second line |  |  |"
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_a_row_that_does_not_fit_is_refused_and_a_long_cell_is_cut() -> None:
    with pytest.raises(ValueError, match="2 cells does not fit a table of 1"):
        page.table(["a"], [["1", "2"]])
    assert len(page.one_line("x" * 1000)) == 260


def test_every_section_that_the_command_writes_stands_on_the_page() -> None:
    text = page.PAGE.read_text()
    for section in ("truth", "exchange", "layer", "step", "memory", "longest"):
        assert f"<!-- {section} -->\n" in text
        assert f"<!-- /{section} -->" in text
