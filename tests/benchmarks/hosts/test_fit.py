"""The line through measured values, where two lines have a ratio, and the page that the commands write."""

from pathlib import Path

import pytest

from benchmarks.hosts import page
from benchmarks.hosts.fit import Line, fit, where_ratio

PARTS = ("traffic", "doubled", "throughput", "accumulated", "latency")


def test_a_line_through_points_on_it_is_that_line() -> None:
    found = fit([(x, 3 + 0.5 * x) for x in (1.0, 10.0, 1000.0)])
    assert (found.offset, found.slope) == pytest.approx((3, 0.5))


def test_relative_errors_count() -> None:
    """An error of a tenth weighs the same at a small value as at a large one."""
    found = fit([(1, 1.1), (1, 0.9), (1000, 1100), (1000, 900)])
    assert 0.9 < found.at(1) < 1.1
    assert found.at(1000) == pytest.approx(1000 * found.at(1), rel=0.01)


def test_where_one_line_is_so_many_times_another() -> None:
    above, below = Line(10, 8), Line(8, 2)
    x = where_ratio(above, below, 2.5)
    assert x is not None
    assert above.at(x) == pytest.approx(2.5 * below.at(x))
    assert where_ratio(above, below, 5.0) is None
    assert where_ratio(Line(10, 2), Line(8, 2), 1.0) is None


def test_a_part_of_the_page_is_replaced(tmp_path: Path) -> None:
    copy = tmp_path / "wire.md"
    copy.write_text(page.PAGE.read_text())
    for part in PARTS:
        page.replace(part, f"new {part}", copy)
        page.replace(part, f"newer {part}", copy)
    written = copy.read_text()
    assert [written.count(f"newer {part}") for part in PARTS] == [1] * len(PARTS)
    assert "new traffic" not in written
    with pytest.raises(ValueError, match="no part 'weather'"):
        page.replace("weather", "", copy)
