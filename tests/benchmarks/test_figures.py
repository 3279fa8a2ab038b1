"""The figures of the docs: every value and name is drawn, and the same values give the same text."""

from xml.etree import ElementTree

from benchmarks.figures import Series, bars, beside_published, by_row, lines

SVG = "{http://www.w3.org/2000/svg}"


def _names(svg: str) -> set[str | None]:
    return {text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")}


def test_lines_draw_every_point_and_name() -> None:
    series = [Series(name="a & b", points=[(1, 2), (10, 30)], curve=[(1, 2), (10, 20)]), Series(name="c", points=[(5, 5)])]
    svg = lines(series, x="tokens", y="MiB")
    assert {"a & b", "c", "tokens", "MiB", "10", "20"} <= _names(svg)
    more = lines([*series, Series(name="d", points=[(2, 3), (3, 4)])], x="tokens", y="MiB")
    assert more.count("<use") - svg.count("<use") == 2 + 1  # and the mark in the legend


def test_bars_draw_every_value_and_leave_out_what_a_row_lacks() -> None:
    rows = by_row({"8k": {"longspan": 1.25, "peer": 4.5}, "16k": {"longspan": 1.75, "third": 2.25}})
    assert rows == {"longspan": {"8k": 1.25, "16k": 1.75}, "peer": {"8k": 4.5}, "third": {"16k": 2.25}}
    found = _names(bars(rows, x="time", goal=1.3))
    assert {"1.25", "4.5", "1.75", "2.25", "longspan", "peer", "third", "8k", "16k", "time"} <= found


def test_predicted_values_stand_beside_the_published_ones() -> None:
    svg = beside_published({f"source {i}": [(i + 1, i + 1.5)] for i in range(12)}, x="published", y="predicted")
    assert {"source 0", "source 11", "published", "predicted"} <= _names(svg)


def test_equal_values_give_equal_text() -> None:
    first, second = (bars({"a": {"b": 1.0}}, x="x") for _ in range(2))
    assert first == second
