"""Numbers as people read them."""

import pytest

from longspan.planner.units import count_text, duration, gib


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2e-7, "0.2 us"), (3.61e-3, "3.61 ms"), (7.79, "7.79 s"), (2033.95, "2,033.95 s"), (7200, "2.00 hours"),
     (90_000, "25.00 hours"), (864_000, "10.00 days"), (6.3072e7, "2.00 years")],
)  # fmt: skip
def test_seconds(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_parameters_and_bytes() -> None:
    assert [count_text(n) for n in (1_410_304, 8_030_261_248, 999_900_000, 1.2e12, 12)] == [
        "1.41M",
        "8.03B",
        "1B",
        "1.2T",
        "12",
    ]
    assert [gib(n * 2**30) for n in (52.6, 0.00525, 0)] == ["52.6 GiB", "0.00525 GiB", "0.0 GiB"]
