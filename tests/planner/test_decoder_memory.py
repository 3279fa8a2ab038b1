"""The decoder's closed form for any layout: what each axis divides, and the peak of rehearsed ranks within a tenth."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longspan.cli.rehearse import RehearseSettings
from longspan.cli.rehearsed_plan import predicted
from longspan.planner.decoder_memory import decoder_footprint
from longspan.planner.model import PRESETS
from longspan.planner.strategy import Strategy, Workload
from tests.helpers.ranks import on_ranks
from tests.helpers.rehearsals import rehearsed

TINY, WORK = PRESETS["tiny"], Workload(tokens=4096)


def test_what_each_axis_divides() -> None:
    one = decoder_footprint(TINY, Strategy(), WORK, "fp32")
    ring, ulysses = (decoder_footprint(TINY, Strategy(**{axis: 2}), WORK, "fp32") for axis in ("ring", "ulysses"))
    assert one.states == ring.states == ulysses.states == 12 * TINY.parameters
    assert 2 * ring.saved == one.saved
    assert ulysses.saved - ring.saved == TINY.layers * 2048 * TINY.query_width * 4  # the output for my tokens beside my heads'
    tensor = decoder_footprint(TINY, Strategy(tensor=2), WORK, "fp32")
    whole = TINY.embedding_parameters + TINY.head_parameters
    words = (2 - TINY.tied) * TINY.vocab * TINY.hidden
    assert tensor.states == 12 * (TINY.layer_parameters // 2 + whole - words // 2)
    odd = replace(TINY, vocab=TINY.vocab + 1)
    rows = decoder_footprint(odd, Strategy(tensor=2), WORK, "fp32").states - tensor.states  # stored whole
    assert rows == 12 * (words // 2 + (2 - TINY.tied) * TINY.hidden)
    stage = decoder_footprint(TINY, Strategy(pipeline=2), Workload(tokens=4096, rows=2), "fp32")
    assert stage.saved == one.saved  # half of the layers, two micro-batches in flight
    assert stage.states == 12 * (TINY.layer_parameters // 2 + TINY.head_parameters)
    shards = decoder_footprint(TINY, Strategy(ulysses=2, zero=3), WORK, "fp32")
    assert shards.states == 12 * TINY.parameters // 2


def test_autocast_saves_a_wide_residual_and_narrow_weights() -> None:
    """Beside it FSDP2's bf16, whose norms save their input and their normalized input in fp32 and their output in bf16."""
    cast, stored = (decoder_footprint(TINY, Strategy(ulysses=2, zero=zero), WORK, "bf16") for zero in (0, 2))
    outputs = 2 * TINY.layers * TINY.hidden  # of the norms, in fp32 with autocast: the fp32 inputs are the residual then
    assert cast.saved - (stored.saved - 2 * TINY.parameters) == 2048 * outputs * 2 + 2 * TINY.parameters


LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {"world": 1},
    "ring 2": {"world": 2, "ring": 2},
    "ulysses 2, zero=3": {"world": 2, "ulysses": 2, "zero": 3},
    "ulysses 2, bf16": {"world": 2, "ulysses": 2, "dtype": "bf16"},
    "pipeline 2": {"world": 2, "pipeline": 2},
    "tensor 2": {"world": 2, "tensor": 2},
}


@pytest.mark.long
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_peak_of_a_rehearsed_rank_is_near(name: str, tmp_path: Path) -> None:
    settings = RehearseSettings(tokens=8192, steps=1, **LAYOUTS[name])
    (found,) = on_ranks(1, rehearsed, replace(settings, rank=0), 0, tmp_path=tmp_path)
    plan = predicted(settings, "bf16" if settings.dtype == "bf16" else "fp32")
    assert plan["bytes"] == pytest.approx(found.peak_bytes, rel=0.1), found.kinds
