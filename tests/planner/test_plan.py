"""The plan: the best of all legal layouts, what a user can ask of it, and what is refused with a sentence."""

import time
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from longspan import plan
from longspan.errors import LayoutError, ModelError
from longspan.planner.cost import step_time
from longspan.planner.explain import kinds, parts
from longspan.planner.hardware import CLUSTERS, cluster
from longspan.planner.model import PRESETS, dense
from longspan.planner.rank_memory import rank_memory
from longspan.planner.search import degree_rows, option_rows, search
from longspan.planner.setting import Setting
from longspan.planner.strategy import Recipe, Strategy, Workload, check
from longspan.planner.uncertainty import memory_bound


def test_the_search_finds_what_pricing_every_layout_alone_finds() -> None:
    x = Setting(PRESETS["llama-8b"], cluster("h100", 8), Recipe(), Workload(tokens=65_536, rows=2))
    found = search(x, {"tile_tokens": 4096, "head_chunks": 1})
    priced = []
    for row in degree_rows(x, {}):
        for option in option_rows({"tile_tokens": 4096, "head_chunks": 1}):
            names = ("zero", "moved", "full", "selective", "offload")
            o = dict(zip(names, map(int, option)))
            strategy = Strategy(
                **dict(zip(("pipeline", "data", "ring", "ulysses", "tensor", "micro_batch"), map(int, row))),
                zero=o["zero"], tile_tokens=4096, recompute="full" if o["full"] else "selective" if o["selective"] else "none",
                offload_activations=bool(o["offload"]), offload_parameters=bool(o["moved"]), offload_optimizer=bool(o["moved"]),
            )  # fmt: skip
            if strategy.tensor > 1:  # tiles are not legal
                continue
            check(x.shape, x.workload, strategy, 8)
            memory = rank_memory(x, strategy)
            held = memory.total * memory_bound(strategy)
            if held <= x.cluster.accelerator.memory and memory.host <= x.cluster.host_memory:
                priced.append(float(step_time(x, strategy).total))
    assert found.best is not None
    assert min(priced) <= found.best.seconds <= 1.01 * min(priced)
    assert found.fitting == len(priced)


def test_a_plan_is_frozen_and_fits_and_its_longest_sequence_is_the_longest() -> None:
    found = plan("llama-8b", hardware="h100", gpus=8, tokens=131_072, price=2.0)
    with pytest.raises(FrozenInstanceError):
        found.best.seconds = 0.0  # type: ignore[misc]
    assert found.best.bytes <= found.cluster.accelerator.memory
    assert found.best.strategy.ranks == 8
    assert found.best.tokens_per_second == pytest.approx(131_072 / found.best.seconds)
    assert found.best.price_per_million_tokens == pytest.approx(16 / 3600 * found.best.seconds / 0.131072)
    assert found.runner_up is not None
    assert 1.01 * found.runner_up.seconds >= found.best.seconds
    assert plan("llama-8b", gpus=8, tokens=found.longest).fitting > 0
    with pytest.raises(LayoutError, match="does not fit on 8 H100"):
        plan("llama-8b", gpus=8, tokens=int(found.longest * 1.01))


def test_goals() -> None:
    longest = plan("llama-8b", gpus=8, goal="length")
    assert longest.workload.tokens == longest.longest
    cheapest = plan("llama-8b", gpus=64, tokens=8192, rows=1, price=2.0, goal="cost")
    every = plan("llama-8b", gpus=64, tokens=8192, rows=1, price=2.0)
    assert cheapest.best.price_per_million_tokens is not None
    assert every.best.price_per_million_tokens is not None
    assert cheapest.best.price_per_million_tokens <= every.best.price_per_million_tokens
    assert cheapest.cluster.gpus < 64


def test_every_number_says_why_and_the_sentences_have_the_numbers() -> None:
    best = plan("llama-8b", gpus=8, tokens=262_144, fixed={"ulysses": 8}).best
    assert best.strategy.ulysses == 8
    for name in ("seconds", "bytes", *best.time.__dataclass_fields__, *(k for k, _ in kinds(best.memory))):
        assert best.why(name).startswith(f"{name} = ")
        assert any(character.isdigit() for character in best.why(name))
    assert f"{8 * 1024 * 4096 * 4 * 2 * 32 / 2**20 / 8:,.1f} MiB" in " ".join(best.explain()), "4 N h / P elements of bf16"
    assert all(name in best.why("bytes") for name, _ in kinds(best.memory)), "every kind of memory is a term of the total"
    with pytest.raises(KeyError, match="there are seconds"):
        best.why("colour")
    assert sum(value for _, value in parts(best.time)) == pytest.approx(best.seconds)


def test_more_ranks_than_heads_take_a_ring() -> None:
    shape = dense("few heads", layers=4, hidden=512, heads=4, ffn=2048, vocab=1000)
    found = plan(shape, gpus=64, tokens=1 << 20, rows=1)
    assert found.best.strategy.ulysses * found.best.strategy.tensor <= 4
    assert found.best.strategy.ring > 1


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_cluster_has_figures_with_a_source(name: str) -> None:
    where = cluster(name, 16)
    device = where.accelerator
    assert all(0 < device.matmul[dtype] <= device.peak[dtype] for dtype in device.peak)
    assert device.source
    assert all(link.source and link.bandwidth > 0 for link in (where.inside, where.between, where.to_host))
    assert plan("llama-1b", hardware=name, gpus=16, tokens=8192).best.seconds > 0


def test_an_l20_has_the_memory_that_nvidia_smi_shows() -> None:
    device = cluster("l20", 1).accelerator
    assert device.memory == 46_068 * 2**20
    assert "memory: nvidia-smi" in device.source


def test_a_thousand_gpus_are_searched_quickly() -> None:
    begin = time.perf_counter()
    found = search(Setting(PRESETS["llama-70b"], cluster("h100", 1024), Recipe(), Workload(tokens=32_768, rows=256)))
    assert found.legal > 50_000
    assert time.perf_counter() - begin < 20  # about one second on a quiet core


@pytest.mark.parametrize(
    ("asked", "reason"),
    [({"hardware": "h10"}, "did you mean h100"), ({"price": 0}, "above 0"),
     ({"fixed": {"tensor": 3}}, "legal are 1, 2, 4, 8"),
     ({"fixed": {"ulysses": 64}}, "ulysses=32 ring=2"), ({"goal": "length"}, "contradict"),
     ({"goal": "cost"}, "needs the price"),
     ({"hardware": "a100", "dtype": "fp8"}, "has no fp8"), ({"fixed": {"colour": 3}}, "is no degree"),
     ({"price": float("inf")}, "finite"), ({"tokens": 1 << 70}, "at most 1,099,511,627,776"),
     ({"rows": 1 << 40}, "at most 1,048,576"), ({"gpus": 10**11}, "use at most 1,048,576"),
     ({"rows": 0}, "at least 1"), ({"fixed": {"full": 1, "selective": 0, "tensor": 5}}, "legal are 1, 2"),
     ({"fixed": {"zero": 0, "offload_parameters": 1}}, "zero=3 only"), ({"gpus": 0}, "at least 1"),
     ({"gpus": 7}, "no degrees fill 7 GPUs|legal are")],
)  # fmt: skip
def test_what_is_refused_says_why(asked: dict[str, Any], reason: str) -> None:
    arguments: dict[str, Any] = {"tokens": 8192, "gpus": 8} | asked
    if arguments["gpus"] == 7:
        arguments |= {"fixed": {"ulysses": 1, "ring": 1, "pipeline": 1}}
    with pytest.raises(LayoutError, match=reason):
        plan("llama-8b", **arguments)


def test_a_length_beyond_the_positions_and_an_unknown_model_are_refused() -> None:
    with pytest.raises(LayoutError, match="beyond the 4,096 positions"):
        plan(replace(PRESETS["llama-8b"], positions=4096), tokens=8192)
    with pytest.raises(ModelError, match="hf:FOLDER"):
        plan("llama-9b", tokens=8192)
