"""How many examples a property test draws: few in ``make test``, many in ``make test-long``."""

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings

MANY = "many"  # the profile of make test-long: pytest --hypothesis-profile many

Test = TypeVar("Test", bound=Callable[..., Any])


def examples(few: int, many: int) -> Callable[[Test], Test]:
    """A decorator above ``@given``: draw ``few`` examples, or ``many`` under the profile of ``make test-long``.

    The few are the same in every run, so that a commit passes or fails reproducibly; the many differ between runs.
    """
    long = settings.get_current_profile_name() == MANY
    brief = () if long else (Phase.shrink, Phase.explain, Phase.reuse, Phase.target)
    drawn = settings(
        max_examples=many if long else few,
        deadline=None,  # on two busy cores an example takes what it takes
        derandomize=not long,
        print_blob=True,
        phases=[phase for phase in Phase if phase not in brief],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )

    def mark(test: Test) -> Test:
        marked: Test = pytest.mark.examples(drawn(test))
        return marked

    return mark
