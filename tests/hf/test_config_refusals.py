"""Models that their config already rules out."""

from collections.abc import Callable

from tests.helpers.encoder_decoders import build_pair, refused_pair
from tests.helpers.ranks import Ranks


def test_layers_that_are_dropped_at_random_are_refused(pool: Callable[[int], Ranks]) -> None:
    (said,) = pool(1).run(refused_pair, build_pair("bart", decoder_layerdrop=0.1))
    assert "config.decoder_layerdrop drops layers at random, other ones on every rank; set it to 0" in said
