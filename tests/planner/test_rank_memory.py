"""Memory of the fullest rank, kind by kind: stages of a pipeline, buckets, a sharded vocabulary, reserved and allocated."""

from dataclasses import replace

import numpy as np
import pytest

from longspan.distributed.pipeline_options import split_layers
from longspan.planner.hardware import cluster
from longspan.planner.model import PRESETS, dense
from longspan.planner.rank_memory import cached_bytes, end_layers, forward_bytes, fullest_stage, rank_memory, saved_bytes
from longspan.planner.setting import Setting
from longspan.planner.strategy import Recipe, Strategy, Workload

LLAMA = PRESETS["llama-8b"]
X = Setting(LLAMA, cluster("h100", 8), Recipe(), Workload(tokens=8192, rows=16))


@pytest.mark.parametrize("pipeline", [1, 2, 4, 8])
def test_a_pipeline_has_the_layers_that_it_has_at_run_time(pipeline: int) -> None:
    shape = dense("wide vocabulary", layers=28, hidden=3072, heads=32, ffn=8192, vocab=131_072)
    x, s = replace(X, shape=shape), Strategy(pipeline=pipeline)
    head = shape.vocab * shape.hidden / (shape.layer_parameters / shape.layers)
    stages = split_layers([1.0] * 28, pipeline, last_cost=head)
    assert tuple(int(n) for n in end_layers(x, s)) == (len(stages[0]), len(stages[-1]))
    if pipeline > 1:
        assert len(stages[0]) > len(stages[-1]), "the head counts as layers"
    even = replace(x, recipe=Recipe(balanced_stages=False))
    assert tuple(int(n) for n in end_layers(even, s)) == (-(-28 // pipeline),) * 2


def test_the_fullest_stage_holds_what_the_kinds_count() -> None:
    for pipeline, chunked in ((1, True), (4, True), (4, False), (8, False)):
        s = Strategy(pipeline=pipeline, chunked_loss=chunked)
        held, layers, flight = (float(n) for n in fullest_stage(X, s))
        found = rank_memory(X, s)
        assert float(found.parameters) == pytest.approx(4 * held)
        assert float(found.saved) == pytest.approx(layers * flight * float(saved_bytes(X, s)))
        assert flight in (1, min(pipeline, 16))
        assert float(found.logits) == 0 or flight == 1


def test_the_first_stage_is_the_fullest_until_logits_are_larger() -> None:
    long, short = (replace(X, workload=Workload(tokens=65_536, rows=rows)) for rows in (16, 1))
    assert float(rank_memory(long, Strategy(pipeline=8, chunked_loss=False)).logits) == 0
    assert float(rank_memory(short, Strategy(pipeline=8, chunked_loss=False)).logits) > 0


def test_buckets_that_reduce_gradients_are_there_with_several_ranks_only() -> None:
    with_buckets = replace(X, recipe=Recipe(bucket_bytes=2))
    for data, more in ((1, 0), (8, 2)):
        s = Strategy(data=data)
        found = float(rank_memory(with_buckets, s).gradients) - float(rank_memory(X, s).gradients)
        assert found == pytest.approx(more * LLAMA.parameters)


def test_logits_of_a_sharded_vocabulary_have_the_gathered_input_of_the_head_beside_them() -> None:
    s = Strategy(tensor=8, chunked_loss=False)
    found = float(rank_memory(X, s).logits)
    assert found == 8192 * (128_256 // 8 * 14 + 4096 * 2 * 7 / 8)
    unsharded = replace(X, recipe=Recipe(sharded_norms=False))
    assert float(rank_memory(unsharded, s).logits) == 8192 * 128_256 // 8 * 14


def test_the_allocator_keeps_freed_blocks_of_a_layer_where_logits_are_the_peak() -> None:
    s = Strategy(ulysses=8, chunked_loss=False)
    assert float(cached_bytes(X, s)) == float(forward_bytes(X, s)) > 0
    assert float(cached_bytes(X, replace(s, chunked_loss=True))) == 0
    small = replace(X, shape=dense("few words", layers=4, hidden=4096, heads=32, ffn=14_336, vocab=512))
    assert float(cached_bytes(small, s)) == 0
    assert np.all(cached_bytes(X, s) < rank_memory(X, s).logits)
