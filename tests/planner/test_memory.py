"""The closed form of a step's peak beside what the allocator gave, over lengths and sets of tools, on two ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan import ParallelMesh, parallelize, shard_batch
from longspan.cli.rehearsal import recorded_peak
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import DecoderConfig
from longspan.planner.memory import Sizes, footprint, kept_by_exchanges
from tests.helpers.options import keywords
from tests.helpers.ranks import on_ranks
from tests.helpers.settled import Settled

CONFIG = DecoderConfig(vocab=512, layers=3, hidden=128, heads=4, kv_heads=2, head_dim=32, ffn=512)
SETS: dict[str, dict[str, Any]] = {
    "none": {},
    "recomputed": {"recompute": "full", "tile_tokens": 256},
    "selective": {"recompute": "selective", "tile_tokens": 256},
    "in chunks": {"head_chunks": 2, "tile_tokens": 256},
    "recomputed in chunks": {"recompute": "full", "head_chunks": 2, "tile_tokens": 256},
    "all": {"recompute": "selective", "tile_tokens": 256, "head_chunks": 2, "zero": 3},
}
FIRST = ("none", "recomputed", "all")
LENGTHS = (2048, 4096, 6144, 8192, 12288)


def assert_near(name: str, lengths: tuple[int, ...], tmp_path: Path) -> None:
    found = on_ranks(2, steps, CONFIG, SETS[name], lengths, tmp_path=tmp_path)[0]
    for tokens, measured in zip(lengths, (sum(fullest.values()) for fullest in found)):
        predicted = footprint(CONFIG, parameters=CONFIG.parameters, tokens=tokens, ranks=2, **SETS[name]).peak
        assert predicted == pytest.approx(measured, rel=0.1), f"{tokens} tokens"


def test_the_peak_is_near_the_closed_form(tmp_path: Path) -> None:
    assert_near("none", (2048, 4096), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", SETS)
def test_the_peak_is_near_the_closed_form_with_every_set_of_tools(name: str, tmp_path: Path) -> None:
    assert_near(name, LENGTHS if name in FIRST else LENGTHS[1::2], tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", FIRST)
def test_activations_fall_as_the_ranks_grow(name: str, tmp_path: Path) -> None:
    """At 16,384 tokens, where tiles are small beside them: activations and received buffers of 4 ranks are half those of 2.

    The send buffer leaves out what a rank keeps, so that it holds (P-1)/P of 1/P of the row: 3/16 on 4 ranks, 1/4 on 2.
    """
    config = replace(CONFIG, kv_heads=4)
    sizes = []
    for ranks in (2, 4):
        (tmp_path / str(ranks)).mkdir()
        tools = SETS[name] | ({"head_chunks": 1} if name == "all" else {})  # each rank has a head to give to a chunk
        fullest = on_ranks(ranks, steps, config, tools, (16_384,), tmp_path=tmp_path / str(ranks))[0][0]
        sizes.append((fullest["activations"] + fullest["exchange"], fullest["send buffer"]))
    (two, sent_by_two), (four, sent_by_four) = sizes
    assert four / two == pytest.approx(1 / 2, rel=0.05)
    assert sent_by_four / sent_by_two == pytest.approx(3 / 4, rel=0.05)


def steps(config: DecoderConfig, tools: dict[str, Any], lengths: tuple[int, ...]) -> list[dict[str, int]]:
    """For each length, what is there at the fullest of the second step, by category, and what is kept for exchanges."""
    return [fullest(config, tools, tokens) for tokens in lengths]


def fullest(config: DecoderConfig, tools: dict[str, Any], tokens: int) -> dict[str, int]:
    mesh = ParallelMesh(ulysses=torch.distributed.get_world_size(), transport=Settled())
    model = parallelize(Decoder(config), mesh, **keywords(tools))
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(config.vocab, (1, tokens))
    torch.distributed.broadcast(ids, 0)

    def step() -> None:
        model(**shard_batch({"input_ids": ids, "labels": ids}, mesh)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    found, sent = recorded_peak(model, optimizer, step, mesh), mesh.scratch.send_bytes
    return found | {"exchange": found["exchange"] - sent, "send buffer": sent}


@pytest.mark.parametrize(("ring", "copies"), [(1, 0), (2, 1), (3, 2), (8, 2)])
def test_a_ring_holds_keys_and_values_on_their_way_and_their_gradients(ring: int, copies: int) -> None:
    """In bf16, 2 bytes an element and 4 of a gradient; the exchange of ulysses ranks of as many tokens is apart."""
    sizes = Sizes(vocab=256, layers=1, hidden=64, heads=8, kv_heads=2, head_dim=8, ffn=128)
    one = {"parameters": 1000, "itemsize": 2, "ulysses": 1}
    feed_forward = footprint(sizes, tokens=32 * ring, ranks=ring, zero=2, fsdp_ranks=1, **one).phases["feed-forward"]
    alone = footprint(sizes, tokens=32, ranks=1, zero=2, fsdp_ranks=1, **one).phases["feed-forward"]
    assert feed_forward - alone == copies * 2 * (32 * 16) * (2 + 4)


def test_a_ring_sends_a_key_head_for_each_ulysses_rank_that_reads_it() -> None:
    sizes = Sizes(vocab=256, layers=1, hidden=64, heads=8, kv_heads=2, head_dim=8, ffn=128)
    two, four = (
        footprint(sizes, parameters=1000, tokens=32 * 2 * ulysses, ranks=2 * ulysses, ulysses=ulysses).phases["feed-forward"]
        - footprint(sizes, parameters=1000, tokens=32 * ulysses, ranks=ulysses, ulysses=ulysses).phases["feed-forward"]
        for ulysses in (2, 4)
    )
    assert (two, four) == (2 * 32 * 16 * 8, 2 * 32 * 32 * 8)  # one of the two heads a rank, of all tokens of a ring rank


def held(tools: dict[str, Any], tokens: int, config: DecoderConfig = CONFIG) -> int:
    mesh = ParallelMesh(ulysses=torch.distributed.get_world_size())
    model = parallelize(Decoder(config), mesh, **keywords(tools))
    ids = torch.zeros(1, tokens, dtype=torch.long)
    for _ in range(2):
        model(**shard_batch({"input_ids": ids, "labels": ids}, mesh)).loss.backward()
    return mesh.scratch.held_bytes


@pytest.mark.parametrize("tools", [{}, {"recompute": "full"}, {"recompute": "selective"}, SETS["all"]])
def test_what_exchanges_keep_is_the_closed_form(tools: dict[str, Any], tmp_path: Path) -> None:
    """The buffers that are there after a step: all of them idle then, also those in which activations were saved."""
    found = on_ranks(2, held, tools, 8192, tmp_path=tmp_path)[0]
    chunks, recompute = tools.get("head_chunks", 1), tools.get("recompute", "none")
    saved = CONFIG.layers * 4096 * (2 * CONFIG.heads + 2 * CONFIG.kv_heads) * CONFIG.head_dim * 4
    kept = kept_by_exchanges(CONFIG, 4096, 2, recompute, chunks, itemsize=4)
    assert found == kept + saved * (recompute == "none")


def test_a_rank_between_others_keeps_a_send_buffer_with_its_own_part(tmp_path: Path) -> None:
    config = replace(CONFIG, heads=6, kv_heads=6)
    edge, middle, other_edge = on_ranks(3, held, {"recompute": "full"}, 6144, config, tmp_path=tmp_path)
    assert edge == other_edge == kept_by_exchanges(config, 2048, 3, "full", 1, itemsize=4)
    assert middle - edge == 2048 * (3 * 6 // 3) * config.head_dim * 4


def test_buffers_of_exchanges_that_are_too_large_are_not_kept() -> None:
    sizes = Sizes(vocab=256, layers=1, hidden=64, heads=8, kv_heads=8, head_dim=64, ffn=128)
    small, large = (kept_by_exchanges(sizes, n, 2, "full", 1, itemsize=4) for n in (2**14, 2**16))
    assert small == 2**14 * (3 * 512 // 2 + 3 * 512 + 512) * 4
    assert large == 2**16 * (3 * 512 // 2 + 512) * 4  # of 384 MiB received once nothing is kept


def test_idle_buffers_are_in_every_phase_but_the_one_that_uses_them() -> None:
    sizes = Sizes(vocab=256, layers=1, hidden=64, heads=8, kv_heads=2, head_dim=8, ffn=128)
    kept = kept_by_exchanges(sizes, 2**15, 2, "none", 1, itemsize=4)
    ulysses, ring = (footprint(sizes, parameters=1000, tokens=2**16, ranks=2, ulysses=ulysses).phases for ulysses in (2, 1))
    hops = 2 * (2**15 * 16) * (4 + 4)
    for phase in ("loss", "feed-forward", "update"):
        assert ulysses[phase] - kept == ring[phase] - hops > 0


def test_a_norm_that_computes_in_fp32_saves_its_input_and_its_normalized_input_in_fp32() -> None:
    sizes = Sizes(vocab=256, layers=3, hidden=64, heads=8, kv_heads=2, head_dim=8, ffn=128)
    narrow, wide = (footprint(sizes, parameters=1000, tokens=64, itemsize=2, norm_itemsize=norm) for norm in (None, 4))
    assert wide.saved - narrow.saved == 2 * 3 * 2 * 64 * 64 * 2  # norms x tensors x elements x bytes more
    assert wide.phases["loss"] - narrow.phases["loss"] == 2 * 64 * 64 * 2  # the norm after the layers
