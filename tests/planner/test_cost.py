"""Time and memory of a strategy: what scales, what adds up, what is exposed; and legal degrees."""

from dataclasses import replace

import numpy as np
import pytest

from longspan.distributed.traffic import ID_BYTES, embedding_traffic, vocabulary_loss_traffic
from longspan.errors import LayoutError
from longspan.planner.closed_forms import all_to_all_sent, ulysses_elements
from longspan.planner.collectives import Group, all_to_all_time, gather_time
from longspan.planner.cost import layer_time, loss_time, product_time, step_time, ulysses_bytes, vocabulary_exchange_time
from longspan.planner.hardware import cluster
from longspan.planner.model import PRESETS, dense
from longspan.planner.rank_memory import rank_memory, saved_bytes
from longspan.planner.setting import Setting
from longspan.planner.strategy import Recipe, Strategy, Workload, check

LLAMA = PRESETS["llama-8b"]


def setting(tokens: int = 65_536, rows: int = 8, gpus: int = 64, recipe: Recipe | None = None) -> Setting:
    return Setting(LLAMA, cluster("h100", gpus), recipe or Recipe(), Workload(tokens=tokens, rows=rows))


def test_the_parts_of_a_step_add_up() -> None:
    time = step_time(setting(), Strategy(data=8, ulysses=8, zero=3, recompute="full"))
    assert time.total == pytest.approx(sum(getattr(time, name) for name in time.__dataclass_fields__))
    assert time.matmul > 0
    assert time.recompute > 0
    assert time.bubble == time.pipeline == 0


def test_the_two_all_to_alls_send_the_closed_form() -> None:
    shape = dense("x", layers=1, hidden=1024, heads=16, ffn=4096, vocab=10)
    x = Setting(shape, cluster("h100", 8), Recipe(), Workload(tokens=8192))
    whole = ulysses_elements(8192, 1024, 8) * 2  # bf16
    assert ulysses_bytes(x, Strategy(ulysses=8)) == float(all_to_all_sent(whole, 8))


def test_tensor_ranks_exchange_the_states_of_embedding_and_head() -> None:
    """Seconds of the closed forms of distributed/traffic.py, less ids, labels and the sums of the loss."""
    x, shares = setting(rows=1, gpus=8), [8192] * 8
    embedding = embedding_traffic(shares, 0, hidden=LLAMA.hidden, itemsize=2)
    loss = vocabulary_loss_traffic(shares, 0, hidden=LLAMA.hidden, itemsize=2, terms=2)
    beside = 7 * 8192 * (2 * ID_BYTES + 2 * 2 * 4)
    sent = sum(one.bytes for one in (*embedding, *loss)) - beside
    bandwidth, latency = x.cluster.inside.bandwidth, x.cluster.inside.latency
    assert vocabulary_exchange_time(x, Strategy(tensor=8)) == pytest.approx(sent / bandwidth + 4 * 7 * latency)
    assert vocabulary_exchange_time(x, Strategy(ulysses=8)) == 0
    one, two = (step_time(x, Strategy(tensor=4, pipeline=p)).tensor for p in (1, 2))
    layers = LLAMA.layers * layer_time(x, Strategy(tensor=4)).tensor
    assert one - layers == pytest.approx(vocabulary_exchange_time(x, Strategy(tensor=4)))
    assert two - layers / 2 == pytest.approx((one - layers) / 2)


def test_a_chunked_loss_forms_the_logits_once_more() -> None:
    """A rank of 8,192 tokens: 4 products of [tokens, hidden] and the head with longspan, 3 where the forward has gradients."""
    x, s = setting(), Strategy(data=8, ulysses=8)
    one = product_time(x, 8192, LLAMA.hidden, LLAMA.vocab)
    whole = loss_time(x, replace(s, chunked_loss=False))
    assert loss_time(x, s) - whole == pytest.approx(one)
    assert loss_time(replace(x, recipe=replace(x.recipe, chunked_products=3)), s) == whole


def test_ulysses_traffic_is_constant_when_tokens_and_ranks_grow_together() -> None:
    shape = dense("x", layers=1, hidden=2048, heads=64, ffn=4096, vocab=10)
    few, many = (
        ulysses_bytes(Setting(shape, cluster("h100", n), Recipe(), Workload(tokens=n * 1024)), Strategy(ulysses=n))
        * n
        / (n - 1)
        for n in (8, 32)
    )
    assert few == many


def test_an_axis_that_crosses_nodes_is_slower_and_a_far_one_shares_the_network() -> None:
    h100 = cluster("h100", 64)
    inside, across, shared = (Group(*group, h100) for group in ((8, 1), (16, 1), (8, 8)))
    assert not inside.crosses
    assert across.crosses
    assert gather_time(inside, 1e9) < gather_time(across, 1e9) < gather_time(shared, 1e9)
    assert all_to_all_time(inside, 1e8) < all_to_all_time(across, 1e8)


def test_a_longer_ring_exposes_its_hops_at_short_lengths_only() -> None:
    short, long = (layer_time(setting(tokens=n, rows=1), Strategy(ring=64)).ring for n in (4096, 4_194_304))
    assert short > 0
    assert long == 0


def test_a_pipeline_has_a_bubble_that_interleaving_shortens() -> None:
    plain, interleaved = (step_time(setting(rows=16), Strategy(pipeline=4, data=16, stages_per_rank=v)) for v in (1, 4))
    assert interleaved.bubble == pytest.approx(plain.bubble / 4)


def test_zero_shards_states_and_recomputation_lowers_what_is_saved() -> None:
    x = setting()
    states = [rank_memory(x, Strategy(data=8, ulysses=8, zero=zero)) for zero in range(4)]
    assert states[0].optimizer == states[1].optimizer * 64
    assert states[1].gradients == states[2].gradients * 64
    assert states[2].parameters == states[3].parameters * 64
    saved = [saved_bytes(x, Strategy(data=8, ulysses=8, recompute=r)) for r in ("full", "selective", "none")]
    assert saved == sorted(saved)
    assert saved[0] == 65_536 / 8 * 4096 * 2


def test_offload_moves_bytes_to_the_host() -> None:
    x = setting()
    strategy = Strategy(data=8, ulysses=8, zero=3, recompute="full")
    kept, moved = rank_memory(x, strategy), rank_memory(x, replace(strategy, offload_activations=True, offload_optimizer=True))
    assert moved.total < kept.total
    assert moved.host == pytest.approx(8 * (kept.saved + kept.optimizer + kept.gradients))


def test_unfused_attention_saves_the_bytes_of_the_paper() -> None:
    shape = dense("gpt", layers=1, hidden=6144, heads=64, ffn=24_576, vocab=10, gated=False)
    recipe = Recipe(attention="unfused", selective="attention", sharded_norms=False, saves_gathered=False)
    x = Setting(shape, cluster("a100", 8), recipe, Workload(tokens=2048, rows=4))
    scores = 5 * 64 * 2048 * 2048 * 4
    none, selective = (saved_bytes(x, Strategy(micro_batch=4, recompute=r)) for r in ("none", "selective"))
    assert none - selective == scores
    assert selective == 34 * 2048 * 4 * 6144


def test_arrays_of_layouts_give_what_single_layouts_give() -> None:
    class Columns:
        def __init__(self, strategies: list[Strategy]) -> None:
            for name in (*Strategy.__dataclass_fields__, "full", "selective", "ranks"):
                values = [getattr(s, name) for s in strategies]
                setattr(self, name, np.array(values))

    x = setting()
    several = [Strategy(data=8, ulysses=8, zero=3, recompute="full"), Strategy(data=4, tensor=8, pipeline=2, tile_tokens=4096)]
    together = Columns(several)
    for index, strategy in enumerate(several):
        assert step_time(x, together).total[index] == pytest.approx(float(step_time(x, strategy).total))
        assert rank_memory(x, together).total[index] == pytest.approx(float(rank_memory(x, strategy).total))


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [({"tensor": 3}, "legal are 1, 2, 4, 8"), ({"ulysses": 64}, "ulysses=32 ring=2"),
     ({"data": 3}, "legal data degrees are 1, 2"),
     ({"pipeline": 64}, "at most 32 stages"), ({"zero": 4}, "legal are 0, 1, 2 and 3"), ({"ring": 0}, "at least 1"),
     ({"data": 2}, "multiply to 64"), ({"head_chunks": 40}, "fewer chunks")],
)  # fmt: skip
def test_an_illegal_degree_names_the_legal_ones(strategy: dict[str, int], reason: str) -> None:
    gpus = 64 if "multiply" in reason else None
    with pytest.raises(LayoutError, match=reason):
        check(LLAMA, Workload(tokens=8192, rows=8), Strategy(**strategy), gpus)  # type: ignore[arg-type]


def test_a_length_beyond_the_positions_is_refused() -> None:
    shape = replace(LLAMA, positions=8192)
    check(shape, Workload(tokens=8192), Strategy())
    with pytest.raises(LayoutError, match="beyond the 8,192 positions"):
        check(shape, Workload(tokens=8193), Strategy())


def test_unknown_hardware_and_a_price_of_zero_are_refused() -> None:
    with pytest.raises(LayoutError, match="did you mean h100"):
        cluster("h1000", 8)
    with pytest.raises(LayoutError, match="must be above 0"):
        cluster("h100", 8, price=0)
