"""Every option that saves memory, alone and with all others, on our decoder and on Hugging Face models: guarantee 1."""

from collections.abc import Callable
from copy import deepcopy
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from longspan import (
    LongspanError,
    MemoryOptions,
    ModelError,
    ParallelMesh,
    parallel_state,
    parallelize,
    shard_batch,
    unparallelize,
)
from longspan.distributed.grad_norm import grad_norm
from longspan.hf import chunked_loss
from longspan.kernels import linear_loss
from longspan.memory import offload
from longspan.models.adapter import STATE
from longspan.models.decoder import Decoder
from tests.helpers.hf_models import BASE, assert_gradients, batches, small, squared_error
from tests.helpers.memory_models import ALL, MODELS, SHAPE, TOLERANCE, loss_alone, model_of
from tests.helpers.options import keywords
from tests.helpers.ranks import Ranks, mesh_of

TOOLS: dict[str, dict[str, Any]] = {
    "recompute all": {"recompute": "full"},
    "selective": {"recompute": "selective"},
    "tiles": {"tile_tokens": 5},
    "head chunks": {"head_chunks": 2},
    "offload": {"offload_activations": True},
    "no logits": {"chunked_loss": True},
    "zero 2": {"zero": 2},
    "zero 3": {"zero": 3},
    "zero 3 in halves, on the host": {"zero": 3, "fsdp_ranks": 2, "offload_parameters": True},
    "all": ALL,
    "all, zero 3": ALL | {"zero": 3},
}

LONG = ("qwen3_moe", "gemma2")


def with_tools(name: str, ulysses: int, ring: int, tools: dict[str, Any], batch: str = "odd length") -> None:
    mesh, reference = mesh_of(ulysses, ring), model_of(name)
    whole, tolerance = batches(batch, False), TOLERANCE[name]
    model = parallelize(deepcopy(reference), mesh, **keywords(tools))
    expected = loss_alone(reference, name, whole)
    expected.backward()
    with (  # tiles of four tokens, blocks of twenty words, and nothing too small to be moved to the host
        patch.multiple(linear_loss, LOSS_TOKENS=4, LOSS_WORDS=20),
        patch.object(chunked_loss, "HEAD_TILE_BYTES", 4 * 4 * 97),
        patch.object(offload, "OFFLOAD_BYTES", 0),
    ):
        output = model(**shard_batch(whole, mesh))
        output.loss.backward()
    assert abs(output.loss.item() - expected.item()) <= tolerance * expected.item()
    if tools.get("chunked_loss") and name != "decoder":
        assert output.logits is None
    assert_gradients(model, reference, tolerance)
    total = grad_norm(reference.parameters()).item()
    assert abs(grad_norm(model.parameters()).item() - total) <= tolerance * total
    if not tools.get("zero"):
        unparallelize(model)
        assert not [module for module in model.modules() if {"forward", STATE} & set(vars(module))]


def cases() -> list[Any]:
    """Every model with every tool on 2 and 4 ranks; ``make test`` takes each tool with one model on 2 ranks, another on 4."""
    found = []
    for (turn, tool), (index, name), ranks in product(enumerate(TOOLS), enumerate(MODELS), (2, 4)):
        chosen = (turn + ranks) % len(MODELS) == index
        found.append(pytest.param(name, tool, ranks, marks=() if chosen else pytest.mark.long))
    return found


@pytest.mark.parametrize(("name", "tool", "ranks"), cases())
def test_a_tool_changes_no_number(name: str, tool: str, ranks: int, pool: Callable[[int], Ranks]) -> None:
    ulysses = 1 if (tool, ranks) == ("head chunks", 2) else 2
    halves = {"fsdp_ranks": ranks // 2} if "fsdp_ranks" in TOOLS[tool] else {}
    pool(ranks).run(with_tools, name, ulysses, ranks // ulysses, TOOLS[tool] | halves)


@pytest.mark.parametrize(
    ("batch", "name"),
    [
        ("left padding", "qwen3_moe"), ("a rank without labels", "gemma2"), ("left padding", "llama"), ("even", "decoder"),
        pytest.param("left padding", "gemma2", marks=pytest.mark.long),
        *(pytest.param("a rank without labels", name, marks=pytest.mark.long) for name in ("decoder", "llama", "qwen3_moe")),
    ],
)  # fmt: skip
def test_all_tools_together_on_four_ranks(name: str, batch: str, pool: Callable[[int], Ranks]) -> None:
    pool(4).run(with_tools, name, 2, 2, ALL | {"zero": 3, "fsdp_ranks": 2}, batch)


@pytest.mark.parametrize("name", ["decoder", *(pytest.param(name, marks=pytest.mark.long) for name in ("llama", *LONG))])
def test_in_bf16_the_error_is_near_that_of_one_device(name: str, pool: Callable[[int], Ranks]) -> None:
    """Tiles sum their gradients in fp32; the bound with tiles is 1.5."""
    for ours, theirs in pool(2).run(half_errors, name):
        assert (ours / theirs) ** 0.5 <= 1.5


def half_errors(name: str) -> tuple[float, float]:
    mesh, ours, theirs = mesh_of(2, 1), 0.0, 0.0
    for seed in range(8):
        exact = model_of(name)
        ids = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(seed))
        whole = {"input_ids": ids, "labels": ids}
        half = deepcopy(exact).bfloat16()
        model = parallelize(deepcopy(half), mesh, **keywords(ALL))
        loss_alone(exact, name, whole).backward()
        logits = half(input_ids=ids).logits[:, :-1].flatten(0, 1).float()
        F.cross_entropy(logits, ids[:, 1:].flatten()).backward()
        model(**shard_batch(whole, mesh)).loss.backward()
        ours, theirs = ours + squared_error(model, exact), theirs + squared_error(half, exact)
    return ours, theirs


def test_unparallelize_gives_back_forwards_and_chunks_that_hung_before() -> None:
    model = Decoder(SHAPE, head_chunks=2)
    mine = vars(model.blocks[0])["forward"] = lambda *given: type(model.blocks[0]).forward(model.blocks[0], *given)
    chunks = model.blocks[1].attention.chunks
    unparallelize(parallelize(model, ParallelMesh(), memory=MemoryOptions("full")))
    assert vars(model.blocks[0])["forward"] is mine
    parallelize(model, ParallelMesh(), memory=MemoryOptions(head_chunks=4))
    assert model.blocks[1].attention.chunks != chunks
    unparallelize(model)
    assert model.blocks[1].attention.chunks == chunks


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"zero": 4}, "zero=4 is not supported"),
        ({"dtype": torch.bfloat16}, r"dtype=torch.bfloat16 is for sharded parameters; use torch.autocast, or zero=2"),
        ({"zero": 3, "dtype": torch.int8}, "nothing to compute in"),
        ({"offload_parameters": True}, "offload_parameters=True is for sharded parameters"),
        ({"zero": 3, "fsdp_ranks": 3}, "fsdp_ranks=3 does not divide the 1 ranks; use 1"),
        ({"tile_tokens": 0}, "tile_tokens=0 is not possible; use at least 1"),
        ({"head_chunks": 9}, "9"),
        ({"head_chunks": 0}, "head_chunks=0 is not possible"),
    ],
)
def test_a_tool_that_cannot_be_is_refused_and_nothing_is_changed(asked: dict[str, Any], text: str) -> None:
    model = Decoder(SHAPE)
    with pytest.raises(LongspanError, match=text):
        parallelize(model, ParallelMesh(), **keywords(asked))
    assert parallel_state(model) is None


@pytest.mark.parametrize(
    ("build_it", "asked", "text"),
    [
        (small("BertConfig", "BertForMaskedLM", **BASE), {"chunked_loss": True}, "computes its loss by itself"),
    ],
)
def test_a_hugging_face_model_that_cannot_be_given_a_tool_is_refused(build_it: Any, asked: dict[str, Any], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        parallelize(build_it(), ParallelMesh(), **keywords(asked))


def test_chunks_with_fewer_heads_than_ranks_are_refused_by_every_rank(pool: Callable[[int], Ranks]) -> None:
    expected = "head_chunks=4 leaves 1 query heads to a chunk, and each of ulysses=2 ranks needs one; use head_chunks up to 2"
    assert pool(2).run(too_many_chunks) == [expected] * 2


def too_many_chunks() -> str:
    with pytest.raises(ModelError) as error:
        parallelize(Decoder(SHAPE), mesh_of(2, 1), memory=MemoryOptions(head_chunks=4))
    return str(error.value)


def test_an_unknown_word_for_recomputation_is_refused() -> None:
    options = MemoryOptions()
    object.__setattr__(options, "recompute", "some")  # in the tests the types of arguments are checked first
    with pytest.raises(ModelError, match="recompute='some' is unknown; legal are 'none', 'full', 'selective'"):
        options.__post_init__()
