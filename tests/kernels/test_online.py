"""The online kernel across several tiles of queries and keys, and with a bias that does not learn."""

import pytest
import torch

from longspan.kernels.online import Online, tiles
from longspan.kernels.reference import Reference
from longspan.masks.constructors import Causal, SinkTokens, Window
from tests.helpers.kernel_cases import Slopes, assert_same, bands_of, draw_inputs, naive, run


@pytest.mark.parametrize(
    ("softcap", "biased"),
    [(None, False), (3.0, True), *(pytest.param(*each, marks=pytest.mark.long) for each in ((3.0, False), (None, True)))],
)
def test_online_across_tiles(softcap: float | None, biased: bool) -> None:
    """More keys and queries than one tile, so that merging, skipping and the sums over tiles are met."""
    x = draw_inputs(1300, 2500, heads=4, kv_heads=2, dim=6, v_dim=10)
    bands = bands_of((Causal() & Window(600)) | SinkTokens(3), x)
    assert len({(tile.queries.start, tile.keys.start) for tile in tiles(bands, 4)}) >= 4
    extras = {"softcap": softcap, "bias": Slopes(4) if biased else None}
    assert_same(run(Online(), x, bands, **extras), run(Reference(), x, bands, **extras), 1e-10)


def test_a_bias_that_does_not_learn() -> None:
    x, bias = draw_inputs(20, 20), Slopes(2)
    bias.parameters[0].requires_grad_(False)
    found = run(Online(), x, Causal().bands(20, 20), bias=bias)
    wanted = naive(x, Causal().bands(20, 20), 0.3, bias=Slopes(2))
    assert not found["dbias0"].any()
    torch.testing.assert_close(found["dbias1"], wanted["dbias1"], rtol=1e-10, atol=0)
