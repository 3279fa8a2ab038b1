"""Embedding and head cut by rows of the vocabulary: one device's loss, gradients, logits and norm; traffic; storage; faults."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from longspan import (
    BatchError,
    ModelError,
    ParallelMesh,
    clip_grad_norm_,
    forward_backward,
    linear_cross_entropy,
    parallelize,
    shard_batch,
    unshard,
)
from longspan.distributed.collectives import CountingTransport, TorchTransport
from longspan.distributed.traffic import Traffic, head_traffic, vocabulary_loss_traffic
from longspan.distributed.vocab_parallel import EmbeddingRows, VocabularyRegion
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import DecoderConfig
from tests.helpers.ranks import Ranks

SHAPE = DecoderConfig(vocab=98, layers=2, hidden=32, heads=4, kv_heads=2, head_dim=8, ffn=24)
TOKENS, ROWS = 23, 2
TENSOR, BOTH = {"tensor": 2}, {"tensor": 2, "ulysses": 2}


def model_of(**changes: Any) -> Decoder:
    model = Decoder(DecoderConfig(**(vars(SHAPE) | changes))).double()
    for parameter in model.parameters():
        parameter.data.mul_(5 if parameter.ndim > 1 else 1)
    return model


def batch_of(labelled: slice, vocab: int) -> dict[str, Tensor]:
    """``ROWS`` rows, of which the tokens of ``labelled`` have labels: whole ranks have none."""
    ids = torch.randint(0, vocab, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(ids, -100)
    labels[:, labelled] = ids[:, labelled]
    labels[0, :9] = -100
    return {"input_ids": ids, "labels": labels}


def full(x: Tensor) -> Tensor:
    whole: Tensor = x.full_tensor() if isinstance(x, DTensor) else x
    return whole


def assert_gradients_and_norm(model: Decoder, reference: Decoder) -> None:
    total = torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None]).norm()
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters()):
        assert mine.grad is not None, name
        assert theirs.grad is not None, name
        error = (full(mine.grad) - theirs.grad).norm()
        assert error <= 1e-10 * max(theirs.grad.norm(), 1e-3 * total), f"{name} is off by {error:.1e}"
    torch.testing.assert_close(clip_grad_norm_(model, 1e9), total, rtol=1e-10, atol=0)


CASES = [
    (TENSOR, 0, {"tied": True}, slice(0, 11)), (TENSOR, 3, {}, slice(0, TOKENS)), (BOTH, 0, {}, slice(3, 9)),
    (BOTH, 3, {"tied": True}, slice(0, 11)), (BOTH, 3, {}, slice(14, TOKENS)), (BOTH, 2, {"vocab": 97, "tied": True}, slice(9)),
    ({"tensor": 4}, 0, {"heads": 4, "kv_heads": 4, "vocab": 99}, slice(0, 11)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("degrees", "zero", "changes", "labelled"),
    [*CASES[:2], CASES[3], *(pytest.param(*each, marks=pytest.mark.long) for each in (CASES[2], *CASES[4:]))],
    ids=str,
)
def test_it_is_one_device(
    degrees: dict[str, int], zero: int, changes: dict[str, Any], labelled: slice, pool: Callable[[int], Ranks]
) -> None:
    ranks = degrees["tensor"] * degrees.get("ulysses", 1)
    pool(ranks).run(equals_one_device, degrees, zero, changes, labelled)


def equals_one_device(degrees: Mapping[str, int], zero: int, changes: Mapping[str, Any], labelled: slice) -> None:
    """Loss, gradients with a penalty on the table, and norm, over two steps; then the loss of an evaluation."""
    mesh, reference = ParallelMesh(**degrees), model_of(**changes)
    whole = batch_of(labelled, reference.config.vocab)
    model = parallelize(deepcopy(reference), mesh, zero=zero)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, reference)]
    for _ in range(2):
        loss, part = reference(**whole).loss, shard_batch(whole, mesh)
        (loss + 0.01 * reference.embed.weight.square().sum()).backward()
        my_loss = model(**part).loss
        (my_loss + 0.01 * full(model.embed.weight).square().sum()).backward()
        torch.testing.assert_close(my_loss, loss, rtol=1e-12, atol=0)
        assert_gradients_and_norm(model, reference)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        torch.testing.assert_close(model(**part).loss, reference(**whole).loss, rtol=1e-12, atol=0)
    assert (model.embed.weight is model.head.weight) is reference.config.tied


@pytest.mark.parametrize("vocab", [97, 98])
def test_logits_are_whole_and_differentiable_beside_the_loss(vocab: int, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(logits_are_whole, vocab)


def logits_are_whole(vocab: int) -> None:
    mesh, reference = ParallelMesh(tensor=2), model_of(vocab=vocab, tied=True)
    whole, model = batch_of(slice(0, 11), vocab), parallelize(deepcopy(reference), mesh)
    weight = torch.randn(ROWS, TOKENS, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    wanted, found = reference(**whole), model(**shard_batch(whole, mesh))
    (wanted.loss + (wanted.logits * weight).mean()).backward()
    logits = unshard(found.logits, mesh, tokens=TOKENS)
    torch.testing.assert_close(logits, wanted.logits, rtol=1e-11, atol=1e-11)
    (found.loss + (logits * weight).mean()).backward()
    assert_gradients_and_norm(model, reference)
    with torch.no_grad():
        alone = model(**{name: x for name, x in shard_batch(whole, mesh).items() if "labels" not in name})
        torch.testing.assert_close(unshard(alone.logits, mesh, tokens=TOKENS), wanted.logits, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_on_other_pipeline_stages(tied: bool, pool: Callable[[int], Ranks]) -> None:
    pool(4).run(pipelined, tied)


def pipelined(tied: bool) -> None:
    mesh, reference = ParallelMesh(tensor=2, pipeline=2), model_of(tied=tied)
    whole, model = batch_of(slice(0, 11), 98), parallelize(deepcopy(reference), mesh)
    reference(**whole).loss.backward()
    total = torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None]).norm()
    forward_backward(model, [shard_batch(whole, mesh)])
    known = dict(reference.named_parameters(remove_duplicate=False))
    for name, mine in model.named_parameters():
        theirs = known[name].grad
        assert mine.grad is not None, name
        assert theirs is not None, name
        error = (full(mine.grad) - theirs).norm()
        assert error <= 1e-10 * max(theirs.norm(), 1e-3 * total), f"{name} is off by {error:.1e}"
    torch.testing.assert_close(clip_grad_norm_(model, 1e9), total, rtol=1e-10, atol=0)


def test_what_a_rank_stores(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(stores)


def stores() -> None:
    for vocab, placement, rows in ((98, Shard(0), 49), (97, Replicate(), 97)):
        model = parallelize(model_of(vocab=vocab), ParallelMesh(tensor=2))
        for weight in (model.embed.weight, model.head.weight):
            assert isinstance(weight, DTensor)
            assert weight.placements == (placement,)
            assert len(weight.to_local()) == rows


@pytest.mark.parametrize("vocab", [97, 98])
def test_the_traffic_of_a_loss_and_of_logits_is_the_formula(vocab: int, pool: Callable[[int], Ranks]) -> None:
    for counted, expected in pool(2).run(traffic, vocab):
        assert counted == expected


def traffic(vocab: int) -> tuple[list[Traffic], list[Traffic]]:
    """(forward and backward of a loss, then of logits) counted at the transport, and by the closed forms."""
    mesh = ParallelMesh(tensor=2)
    mesh.transport = transport = CountingTransport(TorchTransport())
    model = parallelize(model_of(vocab=vocab), mesh)
    part = shard_batch(batch_of(slice(0, 5), vocab), mesh)
    hidden = model(**{name: x for name, x in part.items() if "labels" not in name}).hidden.detach().requires_grad_()
    given = {"mesh": mesh, "longspan": part["longspan"], "label_smoothing": 0.1}
    forms: list[Callable[[], Tensor]] = [
        lambda: linear_cross_entropy(hidden, model.head.weight, part["shift_labels"], **given), lambda: model.head(hidden).sum()
    ]  # fmt: skip
    counted = []
    for form in forms:
        transport.traffic = Traffic()
        result = form()
        counted.append(transport.traffic)
        transport.traffic = Traffic()
        result.backward()
        counted.append(transport.traffic)
    at = mesh.coordinate
    loss = vocabulary_loss_traffic(at.tensor_sizes(TOKENS), at.tensor_rank, rows=ROWS, hidden=SHAPE.hidden, itemsize=8, terms=3)
    return counted, [*loss, *head_traffic(vocab, 2, hidden=SHAPE.hidden, itemsize=8)]


def test_every_option_of_the_loss(pool: Callable[[int], Ranks]) -> None:
    pool(3).run(options)


def options() -> None:
    """Scale, softcap, bias, label smoothing and z-loss, on three ranks of which some logits are -inf."""
    mesh, generator = ParallelMesh(tensor=3), torch.Generator().manual_seed(2)
    ids = torch.randint(0, 8, (ROWS, TOKENS), generator=generator)
    part = shard_batch({"input_ids": ids, "labels": ids}, mesh)
    model = parallelize(model_of(heads=6, kv_heads=3, vocab=12), mesh)
    hidden = torch.randn(ROWS, TOKENS, SHAPE.hidden, generator=generator, dtype=torch.float64)
    mine = hidden[:, list(mesh.coordinate.my_positions(TOKENS)[0])].requires_grad_()
    hidden.requires_grad_()
    bias = torch.randn(12, generator=generator, dtype=torch.float64)
    weight = full(model.head.weight).detach().requires_grad_()
    keywords: dict[str, Any] = {"scale": 0.5, "softcap": 2.0, "label_smoothing": 0.2, "z_loss": 0.01}
    wanted = linear_cross_entropy(hidden, weight, F.pad(ids[:, 1:], (0, 1), value=-100), bias=bias, **keywords)
    wanted.backward()
    over = {"mesh": mesh, "longspan": part["longspan"]}
    found = linear_cross_entropy(mine, model.head.weight, part["shift_labels"], bias=bias, **over, **keywords)
    found.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)
    assert mine.grad is not None
    assert hidden.grad is not None
    torch.testing.assert_close(
        mine.grad / 3, hidden.grad[:, list(mesh.coordinate.my_positions(TOKENS)[0])], rtol=1e-11, atol=1e-13
    )
    assert weight.grad is not None
    torch.testing.assert_close(full(model.head.weight.grad), weight.grad, rtol=1e-11, atol=1e-13)
    bias[8:] = -torch.inf  # all rows of the last rank, and no label is one of them
    alone = linear_cross_entropy(hidden, weight, F.pad(ids[:, 1:], (0, 1), value=-100), bias=bias)
    capped = linear_cross_entropy(mine, model.head.weight, part["shift_labels"], bias=bias, **over)
    torch.testing.assert_close(capped, alone, rtol=1e-13, atol=0)
    (gradient,) = torch.autograd.grad(capped, mine)
    assert gradient.isfinite().all()
    with pytest.raises(BatchError, match=r"was given 3 labels with longspan=, whose part has 2 rows of"):
        linear_cross_entropy(mine[0, :3], model.head.weight, part["shift_labels"][0, :3], **over)


def test_where_ids_lie_in_the_rows_of_a_rank() -> None:
    rows = EmbeddingRows("embed", torch.nn.Embedding(7, 2, padding_idx=4))
    found, is_mine, padding = rows.rows(torch.tensor([[0, 3, 4, 6]]), 2, 3)
    assert found.tolist() == [[0, 0, 1, 0]]
    assert is_mine.tolist() == [[False, True, True, False]]
    assert padding == 1
    assert rows.rows(torch.tensor([[0]]), 3, 0)[2] is None


@pytest.mark.parametrize("extra", [7, 8])
def test_a_table_with_more_rows_than_the_embedding_says(extra: int, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(more_rows, extra)


def more_rows(extra: int) -> None:
    mesh, reference = ParallelMesh(tensor=2), model_of()
    more = torch.ones(extra, SHAPE.hidden, dtype=torch.float64)
    reference.embed.weight = torch.nn.Parameter(torch.cat([reference.embed.weight.detach(), more]))
    model, whole = parallelize(deepcopy(reference), mesh), batch_of(slice(0, TOKENS), 98)
    loss, mine = reference(**whole).loss, model(**shard_batch(whole, mesh)).loss
    torch.testing.assert_close(mine, loss, rtol=1e-12, atol=0)
    loss.backward()
    mine.backward()
    assert_gradients_and_norm(model, reference)


def test_hooks_of_the_embedding_see_this_rank_s_ids(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(hooked)


def hooked() -> None:
    """One from before ``parallelize`` that changes the embeddings of an id, and one from after it that reads."""
    mesh, reference, seen = ParallelMesh(tensor=2), model_of(), list[tuple[Tensor, Tensor]]()
    whole = batch_of(slice(0, TOKENS), 98)
    whole["input_ids"][:, 3::4] = 20
    model = deepcopy(reference)
    for each in (reference, model):
        each.embed.register_forward_hook(lambda _, args, out: out.masked_fill((args[0] == 20)[..., None], 0.0))
    parallelize(model, mesh).embed.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    part = shard_batch(whole, mesh)
    loss, mine = reference(**whole).loss, model(**part).loss
    torch.testing.assert_close(mine, loss, rtol=1e-12, atol=0)
    loss.backward()
    mine.backward()
    assert_gradients_and_norm(model, reference)
    assert torch.equal(seen[0][0], part["input_ids"])
    assert seen[0][1].shape[:2] == part["input_ids"].shape


def test_an_embedding_of_other_ids_than_the_tokens_is_refused(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(other_ids)


def other_ids() -> None:
    mesh = ParallelMesh(tensor=2)
    model = model_of()
    model.blocks[0].register_forward_pre_hook(lambda own, args: (model.embed(torch.zeros(1, 5, dtype=torch.long)), None)[1])
    parallelize(model, mesh)
    with pytest.raises(ModelError, match=r"'embed' was given \[1, 5\] instead of ids \[batch, 1. tokens of this rank\]"):
        model(**shard_batch(batch_of(slice(0, 5), 98), mesh))


FAULTS = ["the label's logit not summed", "terms sent back without their gradient", "other ranks' ids looked up"]


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, pool: Callable[[int], Ranks]) -> None:
    with pytest.raises(AssertionError, match="is off by" if "gradient" in fault else "not close"):
        pool(2).run(planted, fault)


def planted(fault: str) -> None:
    combine, rows = VocabularyRegion.of_my_tokens, EmbeddingRows.rows

    def wrong(region: VocabularyRegion, terms: Tensor) -> Tensor:
        right = combine(region, terms)
        if "gradient" in fault:
            return torch.cat([right[:1].detach(), right[1:]])
        return torch.cat([right[:1], right[1:] / 2])

    def unmasked(own: EmbeddingRows, *given: Any) -> Any:
        found, is_mine, padding = rows(own, *given)
        return found, torch.ones_like(is_mine), padding

    if "ids" in fault:
        EmbeddingRows.rows = unmasked  # type: ignore[method-assign]
    else:
        VocabularyRegion.of_my_tokens = wrong  # type: ignore[method-assign]
    try:
        equals_one_device(TENSOR, 0, {}, slice(0, 11))
    finally:
        VocabularyRegion.of_my_tokens, EmbeddingRows.rows = combine, rows  # type: ignore[method-assign]
