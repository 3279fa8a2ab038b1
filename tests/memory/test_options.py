"""Every tool that saves memory, alone and with all others, on our decoder and on Hugging Face models: law 1, norm included."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from longspan import (
    BatchError,
    LongspanError,
    MemoryOptions,
    ModelError,
    ParallelMesh,
    parallel_state,
    parallelize,
    shard_batch,
    unparallelize,
)
from longspan import loss as losses
from longspan.batch.shard import IGNORE
from longspan.distributed.grad_sync import grad_norm
from longspan.hf import chunked_loss as without_logits
from longspan.memory import offload
from longspan.models.adapter import STATE
from longspan.models.decoder import Decoder, DecoderConfig
from tests.helpers.options import keywords
from tests.helpers.ranks import Ranks, mesh_of
from tests.hf.test_adapter import BASE, assert_gradients, batches, build, forward_alone, small, squared_error

ALL: dict[str, Any] = {
    "recompute": "selective", "tile_tokens": 5, "head_chunks": 2, "offload_activations": True, "chunked_loss": True,
}  # fmt: skip
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
MODELS = {"decoder": {}, "llama": {}, "qwen3_moe": {"decoder_sparse_step": 2}, "gemma2": {}}
LONG = ("qwen3_moe", "gemma2")
SHAPE = DecoderConfig(vocab=97, layers=3, hidden=32, heads=4, kv_heads=2, head_dim=8, ffn=48)
TOLERANCE = {"decoder": 1e-10, "llama": 1e-10, "qwen3_moe": 1e-5, "gemma2": 1e-5}


def model_of(name: str) -> Any:
    if name != "decoder":
        return build(name, **MODELS[name])
    model = Decoder(SHAPE).double()
    for parameter in model.parameters():
        parameter.data.mul_(5 if parameter.ndim > 1 else 1)  # else attention is uniform
    return model


def alone(model: Any, name: str, whole: dict[str, torch.Tensor]) -> torch.Tensor:
    if name != "decoder":
        return forward_alone(model, whole, False)[0]
    logits = model(whole["input_ids"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), whole["labels"][:, 1:].flatten())


def with_tools(name: str, ulysses: int, ring: int, tools: dict[str, Any], batch: str = "odd length") -> None:
    mesh, reference = mesh_of(ulysses, ring), model_of(name)
    whole, tolerance = batches(batch, False), TOLERANCE[name]
    model = parallelize(deepcopy(reference), mesh, **keywords(tools))
    expected = alone(reference, name, whole)
    expected.backward()
    with (  # tiles of four tokens, blocks of twenty words, and nothing too small to be put away
        patch.multiple(losses, LOSS_TOKENS=4, LOSS_WORDS=20),
        patch.object(without_logits, "HEAD_TILE_BYTES", 4 * 4 * 97),
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


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", MODELS)
def test_a_tool_changes_no_number(name: str, tool: str, ranks: int, pool: Callable[[int], Ranks]) -> None:
    ulysses = 1 if (tool, ranks) == ("head chunks", 2) else 2
    halves = {"fsdp_ranks": ranks // 2} if "fsdp_ranks" in TOOLS[tool] else {}
    pool(ranks).run(with_tools, name, ulysses, ranks // ulysses, TOOLS[tool] | halves)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", ["left padding", "a rank without labels"])
def test_all_tools_together_on_four_ranks(name: str, batch: str, pool: Callable[[int], Ranks]) -> None:
    if name == "decoder" and batch == "left padding":
        batch = "even"  # its reference here is plain
    pool(4).run(with_tools, name, 2, 2, ALL | {"zero": 3, "fsdp_ranks": 2}, batch)


def test_a_balance_loss_beside_a_loss_without_logits(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(balanced)


def balanced() -> None:
    mesh, reference = mesh_of(2, 1), build("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    ids = batches("odd length", False)["input_ids"]
    expected = reference(input_ids=ids, labels=ids, use_cache=False)
    expected.loss.backward()
    model = parallelize(
        build("mixtral", output_router_logits=True, router_aux_loss_coef=0.5), mesh, memory=MemoryOptions(chunked_loss=True)
    )
    found = model(**shard_batch({"input_ids": ids, "labels": ids}, mesh))
    found.loss.backward()
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert found.aux_loss.item() == pytest.approx(expected.aux_loss.item(), rel=1e-5)
    assert_gradients(model, reference, 1e-5)


@pytest.mark.parametrize("name", ["decoder", "llama", *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
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
        alone(exact, name, whole).backward()
        logits = half(input_ids=ids).logits[:, :-1].flatten(0, 1).float()
        F.cross_entropy(logits, ids[:, 1:].flatten()).backward()
        model(**shard_batch(whole, mesh)).loss.backward()
        ours, theirs = ours + squared_error(model, exact), theirs + squared_error(half, exact)
    return ours, theirs


def test_a_rank_without_labels_joins_a_loss_without_logits_in_bf16(pool: Callable[[int], Ranks]) -> None:
    for ours, theirs in pool(2).run(half_without_labels):
        assert (ours / theirs) ** 0.5 <= 1.5


def half_without_labels() -> tuple[float, float]:
    """The squared errors of all gradients, without logits on two ranks and with logits on one device."""
    mesh, exact, whole = mesh_of(2, 1), model_of("llama"), batches("a rank without labels", False)
    expected = alone(exact, "llama", whole)
    expected.backward()
    half = deepcopy(exact).bfloat16()
    model = parallelize(deepcopy(half), mesh, memory=MemoryOptions(chunked_loss=True))
    alone(half, "llama", whole).backward()
    loss = model(**shard_batch(whole, mesh)).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    return squared_error(model, exact), squared_error(half, exact)


# ---- ZeRO


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_checkpoint_around_the_whole_model_is_no_failed_backward(zero: int, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(checkpointed_whole, zero)


def checkpointed_whole(zero: int) -> None:
    mesh, reference, whole = mesh_of(2, 1), model_of("decoder"), batches("odd length", False)
    model = parallelize(deepcopy(reference), mesh, zero=zero)
    alone(reference, "decoder", whole).backward()
    part = shard_batch(whole, mesh)
    checkpoint(lambda: model(**part).loss, use_reentrant=False).backward()
    assert_gradients(model, reference, 1e-10)


@pytest.mark.parametrize("zero", [2, 3])
def test_after_a_failed_backward_a_sharded_model_is_refused(zero: int, pool: Callable[[int], Ranks]) -> None:
    for text in pool(2).run(fails_once, zero):
        assert "an earlier backward of this model failed" in text


def fails_once(zero: int) -> str:
    mesh, ids = mesh_of(2, 1), batches("odd length", False)["input_ids"]
    model = parallelize(Decoder(SHAPE), mesh, zero=zero)
    for _ in range(2):
        output = model(**shard_batch({"input_ids": ids, "labels": ids}, mesh))
        output.loss.backward()
    output = model(**shard_batch({"input_ids": ids, "labels": ids}, mesh))
    output.hidden.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        output.loss.backward()
    with pytest.raises(ModelError) as error:
        model(**shard_batch({"input_ids": ids, "labels": ids}, mesh))
    return str(error.value)


def test_blocks_compute_in_the_dtype_they_are_given_and_keep_fp32_gradients(pool: Callable[[int], Ranks]) -> None:
    for loss, dtypes, computed in pool(2).run(in_half):
        assert dtypes == {torch.float32}
        assert computed == torch.bfloat16
        assert loss == pytest.approx(4.6, abs=0.3)


def in_half() -> tuple[float, set[torch.dtype], torch.dtype]:
    mesh, seen = mesh_of(2, 1), []
    model = parallelize(Decoder(SHAPE), mesh, zero=2, dtype=torch.bfloat16)
    model.blocks[0].feed.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    ids = batches("odd length", False)["input_ids"]
    loss = model(**shard_batch({"input_ids": ids, "labels": ids}, mesh)).loss
    loss.backward()
    return loss.item(), {parameter.grad.dtype for parameter in model.parameters()}, seen[0]


def test_a_parameter_that_one_rank_does_not_use_counts_as_zero_there(pool: Callable[[int], Ranks]) -> None:
    for error in pool(2).run(unused_on_one_rank):
        assert error <= 1e-12


class Odd(Decoder):
    """Its second block's feed-forward works on rank 0 alone."""

    def __init__(self, everywhere: bool) -> None:
        super().__init__(SHAPE)
        self.everywhere = everywhere
        feed = self.blocks[1].feed
        feed.forward = lambda n: type(feed).forward(feed, n) * (1 if everywhere else 2) if self.uses() else n * 0

    def uses(self) -> bool:
        return self.everywhere or torch.distributed.get_rank() == 0


def unused_on_one_rank() -> float:
    """Two replicas of one row: where the second does not use the feed-forward its gradient there is zero."""
    mesh, model = mesh_of(1, 1), Odd(False).double()
    parallelize(model, mesh, zero=3)
    ids = batches("even", False)["input_ids"]
    one = ids[mesh.coordinate.data_rank : mesh.coordinate.data_rank + 1]
    model(**shard_batch({"input_ids": one, "labels": one}, mesh)).loss.backward()
    grad = model.blocks[1].feed.up.weight.grad.full_tensor()
    if torch.distributed.get_rank() != 0:
        return 0.0
    reference = Odd(False).double()
    logits = reference(ids[:1]).logits[:, :-1].flatten(0, 1)
    (F.cross_entropy(logits, ids[0, 1:], reduction="sum") / (2 * (ids.shape[1] - 1))).backward()
    wanted = reference.blocks[1].feed.up.weight.grad
    return ((grad - wanted).norm() / wanted.norm()).item()


def test_a_decoder_without_memory_is_made_share_by_share(pool: Callable[[int], Ranks]) -> None:
    for equal in pool(2).run(from_meta):
        assert equal


def from_meta() -> bool:
    mesh, whole = mesh_of(2, 1), Decoder(SHAPE, seed=3)
    with torch.device("meta"):
        model = Decoder(SHAPE, seed=3)
    parallelize(model, mesh, zero=3)
    assert isinstance(model, FSDPModule)
    pairs = zip(model.parameters(), whole.parameters(), strict=True)
    return all(torch.equal(mine.full_tensor(), theirs) for mine, theirs in pairs)


# ---- what is given is what is taken back


def test_unparallelize_gives_back_forwards_and_chunks_that_hung_before() -> None:
    model = Decoder(SHAPE, head_chunks=2)
    mine = vars(model.blocks[0])["forward"] = lambda *given: type(model.blocks[0]).forward(model.blocks[0], *given)
    chunks = model.blocks[1].chunks
    unparallelize(parallelize(model, ParallelMesh(), memory=MemoryOptions("full")))
    assert vars(model.blocks[0])["forward"] is mine
    parallelize(model, ParallelMesh(), memory=MemoryOptions(head_chunks=4))
    assert model.blocks[1].chunks != chunks
    unparallelize(model)
    assert model.blocks[1].chunks == chunks


def test_a_tensor_that_is_saved_twice_is_put_away_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "OFFLOAD_BYTES", 0)
    made = []
    copy = offload._HostCopy.__init__
    monkeypatch.setattr(offload._HostCopy, "__init__", lambda self, x: made.append(x.shape) or copy(self, x))

    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (x * y).sum() + (x * y * y).sum()

    block, x, y = Twice(), torch.randn(7, requires_grad=True), torch.randn(7, requires_grad=True)
    expected = torch.autograd.grad(block(x, y), [x, y])
    offload.offload_activations(block)
    found = torch.autograd.grad(block(x, y), [x, y])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(made) == 3  # x, y and their product, of which x is saved twice and y three times


def test_a_token_or_label_that_the_model_does_not_know_is_refused_by_every_rank(pool: Callable[[int], Ranks]) -> None:
    first, second = pool(2).run(unknown_tokens)
    assert first == second
    assert first == [
        "the step holds token or label 97, and Decoder knows 0 to 96; use the model's own tokenizer",
        "the step holds token or label 200, and LlamaForCausalLM knows 0 to 96; use the model's own tokenizer",
        "labels holds -1; tokens are 0 or more, and labels too, or -100",
    ]


def unknown_tokens() -> list[str]:
    """Two replicas: the second alone has the token, the label, and what is negative."""
    mesh, texts = mesh_of(1, 1), []
    for name, key, wrong in (("decoder", "input_ids", 97), ("llama", "labels", 200), ("llama", "labels", -1)):
        model = parallelize(model_of(name), mesh)
        batch = {"input_ids": torch.full((1, 9), 5), "labels": torch.full((1, 9), 5)}
        batch[key][0, 4] = wrong if mesh.coordinate.data_rank else 5
        with pytest.raises(BatchError) as error:
            model(**shard_batch(batch, mesh))
        texts.append(str(error.value))
    return texts


# ---- refusals


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


def test_an_optimizer_that_would_train_nothing_is_refused() -> None:
    model, mesh = Decoder(SHAPE), ParallelMesh()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ModelError, match="SGD was built before the parameters are sharded"):
        parallelize(model, mesh, zero=3)
    parallelize(model, mesh)  # without shares it keeps its parameters
    ids = torch.full((1, 9), 5)
    model(**shard_batch({"input_ids": ids, "labels": ids.where(ids > 0, IGNORE)}, mesh)).loss.backward()
    before = model.head.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.head.weight)


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


def test_zero_1_says_what_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "longspan")
    parallelize(Decoder(SHAPE), ParallelMesh(), zero=1)
    assert "zero=1 is what FSDP2 does with zero=2" in caplog.text


@pytest.mark.parametrize("zero", [2, 3])
def test_after_a_forward_without_a_backward_an_optimizer_takes_the_shares(zero: int, pool: Callable[[int], Ranks]) -> None:
    assert all(pool(2).run(shares_after_an_evaluation, zero))


def shares_after_an_evaluation(zero: int) -> bool:
    mesh, ids = mesh_of(2, 1), batches("odd length", False)["input_ids"]
    model = parallelize(Decoder(SHAPE), mesh, zero=zero)
    with torch.no_grad():
        model(**shard_batch({"input_ids": ids, "labels": ids}, mesh))
    return all(isinstance(parameter, DTensor) for parameter in model.parameters())
