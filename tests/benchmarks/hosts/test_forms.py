"""The closed forms of the bytes of a host's link: those of the library, and what each pair of ranks sends."""

import pytest

from benchmarks.hosts.forms import Size, layer_bytes
from longspan.distributed.layout import Heads
from longspan.distributed.traffic import (
    attention_traffic,
    recomputable_attention_traffic,
    ring_traffic,
    tensor_region_traffic,
)

HEADS, DIM = 24, 8


@pytest.mark.parametrize("ranks", [2, 4, 12])
@pytest.mark.parametrize(("recompute", "form"), [("none", attention_traffic), ("selective", recomputable_attention_traffic)])
def test_ulysses_is_the_library_s_form(ranks: int, recompute: str, form: object) -> None:
    size = Size(tokens=48 * ranks, hidden=HEADS * DIM, hosts=ranks)
    sizes = (48,) * ranks
    forward, backward = form(Heads(HEADS, HEADS, ranks), sizes, sizes, 0, qk_dim=DIM, v_dim=DIM, itemsize=4)  # type: ignore[operator]
    assert layer_bytes("ulysses", recompute, size) == (forward.bytes, forward.bytes + backward.bytes)


@pytest.mark.parametrize("ranks", [2, 4, 12])
def test_megatron_sp_is_two_regions(ranks: int) -> None:
    size = Size(tokens=48 * ranks, hidden=HEADS * DIM, hosts=ranks)
    forward, backward = tensor_region_traffic((48,) * ranks, 0, hidden=HEADS * DIM, itemsize=4)
    assert layer_bytes("tensor", "none", size) == (2 * forward.bytes, 2 * (forward + backward).bytes)
    again = 2 * forward.bytes - forward.bytes // 2  # without the last reduce-scatter
    assert layer_bytes("tensor", "full", size)[1] == 2 * (forward + backward).bytes + again


@pytest.mark.parametrize("ranks", [2, 4, 12])
def test_the_ring_sends_every_key_to_every_rank(ranks: int) -> None:
    size = Size(tokens=48 * ranks, hidden=HEADS * DIM, hosts=ranks)
    hops = [48] * (ranks - 1)
    forward, backward = ring_traffic(hops, hops, 2 * HEADS * DIM, itemsize=4, grad_itemsize=4)
    assert layer_bytes("ring", "none", size) == (forward.bytes, forward.bytes + backward.bytes)


@pytest.mark.parametrize("ranks", [2, 4, 12])
def test_megatron_sp_sends_as_many_times_more_as_there_are_ranks(ranks: int) -> None:
    size = Size(tokens=48 * ranks, hidden=HEADS * DIM, hosts=ranks)
    assert layer_bytes("tensor", "none", size)[0] == ranks * layer_bytes("ulysses", "none", size)[0]


@pytest.mark.parametrize("ranks", [2, 4, 6, 12])
def test_twice_the_tokens_on_twice_the_ranks_are_as_many_bytes_but_for_p_minus_1_over_p(ranks: int) -> None:
    few, many = (
        layer_bytes("ulysses", "none", Size(tokens=48 * count, hidden=HEADS * DIM, hosts=count))[0]
        for count in (ranks, 2 * ranks)
    )
    assert few * ranks * (2 * ranks - 1) == many * 2 * ranks * (ranks - 1)


@pytest.mark.parametrize("axis", ["ulysses", "tensor", "ring"])
def test_a_link_of_a_host_carries_what_its_ranks_send_to_other_hosts(axis: str) -> None:
    size = Size(tokens=48 * 12, hidden=HEADS * DIM, hosts=4, ranks_per_host=3)
    alone = Size(tokens=48 * 12, hidden=HEADS * DIM, hosts=12)
    each = layer_bytes(axis, "none", alone)[0] // 11
    pairs = sum(sender // 3 == 0 != receiver // 3 for sender in range(12) for receiver in range(12))
    assert layer_bytes(axis, "none", size)[0] == each * pairs
