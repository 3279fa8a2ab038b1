"""The loss of one device: from logits, and from hidden states tile by tile, on one rank and on several."""

import re
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import Shard, distribute_tensor

from longspan import loss as losses_of
from longspan.batch.labels import labelled_rows
from longspan.batch.shard import shard_batch, shard_local
from longspan.distributed.coordinate import MeshCoordinate
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import BatchError
from longspan.kernels import linear_loss
from longspan.kernels import matmul as products
from longspan.loss import cross_entropy, linear_cross_entropy
from tests.helpers.ranks import on_ranks

VOCAB = 11
LABELLED = (5, 0, 7, 1)  # of rank 0, 1, 2, 3


def _tokens(rank: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [1, tokens, 6] and labels of one rank: ranks have unequally many tokens and labels."""
    generator = torch.Generator().manual_seed(rank)
    tokens = 8 + rank
    labels = torch.randint(VOCAB, (1, tokens), generator=generator)
    labels[:, LABELLED[rank] :] = -100
    return torch.randn(1, tokens, 6, generator=generator, dtype=torch.float64).to(dtype), labels


def _weight(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_on_one_device_it_is_the_mean_over_labelled_tokens(dtype):
    hidden, labels = _tokens(2, dtype)
    logits = (hidden @ _weight(dtype)).detach().requires_grad_()
    exact = logits.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()

    loss = cross_entropy(logits, labels)
    expected = F.cross_entropy(exact.flatten(0, 1), labels.flatten())
    loss.backward()
    expected.backward()

    assert loss.dtype == exact.dtype
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits.grad, exact.grad.to(dtype))


def test_from_logits_it_saves_nothing_of_their_size_beside_them_and_works_in_tiles(monkeypatch):
    monkeypatch.setattr(losses_of, "LOSS_TOKENS", 3)
    monkeypatch.setattr(losses_of, "LOSS_WORDS", VOCAB)  # three rows a tile, and a rest
    hidden, labels = _tokens(2)
    logits = (hidden @ _weight()).detach().requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss = cross_entropy(logits, labels)
    weight = 3.0  # of a term among others
    (gradient,) = torch.autograd.grad(weight * loss, logits)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(gradient, torch.autograd.grad(weight * expected, logits)[0], rtol=1e-12, atol=1e-15)
    assert [x.data_ptr() for x in saved if x.numel() == logits.numel()] == [logits.data_ptr()]


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
@pytest.mark.parametrize("num_labels", [None, 0, 4])
def test_without_a_label_it_is_zero_with_zero_gradients(shape, num_labels):
    logits = torch.randn(*shape, VOCAB, requires_grad=True)
    loss = cross_entropy(logits, torch.full(shape, -100), num_labels=num_labels)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_over_ranks_it_is_the_loss_of_one_device(ranks, tmp_path):
    everyone = [_tokens(rank) for rank in range(ranks)]
    weight = _weight()
    hidden, labels = (torch.cat(pieces, 1) for pieces in zip(*everyone))
    expected = F.cross_entropy((hidden @ weight).flatten(0, 1), labels.flatten())
    expected.backward()
    losses, gradients = zip(*on_ranks(ranks, _loss_and_gradient, sum(LABELLED[:ranks]), tmp_path=tmp_path))

    for loss in losses:
        assert loss == pytest.approx([expected.item()] * 3, rel=1e-14)
    torch.testing.assert_close(sum(gradients) / ranks, 3 * weight.grad, rtol=1e-13, atol=1e-15)


def _loss_and_gradient(num_labels):
    """The loss with the labels counted, given, and as a sum over micro-batches; the gradient of all three."""
    mesh, weight = ParallelMesh(), _weight()
    hidden, labels = _tokens(mesh.coordinate.data_rank)
    logits = hidden @ weight
    micro = [
        cross_entropy(some_logits, some_labels, mesh=mesh, num_labels=num_labels)
        for some_logits, some_labels in zip(logits.tensor_split(3, 1), labels.tensor_split(3, 1))
    ]
    losses = [
        cross_entropy(logits, labels, mesh=mesh),
        cross_entropy(logits, labels, mesh=mesh, num_labels=num_labels),
        sum(micro),
    ]
    sum(losses).backward()
    return [loss.item() for loss in losses], weight.grad


def test_no_label_on_any_rank_is_zero_with_zero_gradients(tmp_path):
    assert on_ranks(2, _no_label, tmp_path=tmp_path) == [(0.0, 0.0)] * 2


def _no_label():
    logits = torch.randn(1, 4, VOCAB, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, 4), -100), mesh=ParallelMesh())
    loss.backward()
    return loss.item(), logits.grad.abs().sum().item()


# ---- from hidden states, tile by tile


@pytest.fixture
def _small_tiles(monkeypatch):
    monkeypatch.setattr(linear_loss, "LOSS_TOKENS", 3)
    monkeypatch.setattr(linear_loss, "LOSS_WORDS", 4)  # of 11: the last block is smaller


SAYINGS = [
    {}, {"bias": True}, {"scale": 0.25}, {"softcap": 1.5}, {"label_smoothing": 0.1}, {"z_loss": 0.05}, {"ignore_index": 3},
    {"bias": True, "scale": 0.5, "softcap": 2.0, "label_smoothing": 0.2, "z_loss": 0.01, "ignore_index": 3},
]  # fmt: skip


def _written_out(hidden, weight, labels, bias=None, scale=1.0, softcap=None, z_loss=0.0, **more):
    logits = scale * F.linear(hidden.flatten(0, -2), weight, bias)
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    wanted = labels.flatten() != more.get("ignore_index", -100)
    z = logits.logsumexp(1)[wanted].square().sum() / wanted.sum()
    return F.cross_entropy(logits, labels.flatten(), **more) + z_loss * z


@pytest.mark.parametrize("saying", SAYINGS, ids=str)
@pytest.mark.usefixtures("_small_tiles")
def test_a_chunked_loss_is_the_whole_one(saying):
    hidden, labels = _tokens(2)
    keywords = dict(saying)
    labels = labels.where(labels >= 0, keywords.get("ignore_index", -100))
    labels[0, 3] = 3
    if keywords.pop("bias", False):
        keywords["bias"] = torch.randn(VOCAB, dtype=torch.float64).requires_grad_()
    leaves = [hidden.requires_grad_(), _weight().T.detach().requires_grad_(), *filter(torch.is_tensor, keywords.values())]
    expected = torch.autograd.grad(_written_out(hidden, leaves[1], labels, **keywords) * 3, leaves)
    found = linear_cross_entropy(hidden, leaves[1], labels, **keywords)
    torch.testing.assert_close(found, _written_out(hidden, leaves[1], labels, **keywords), rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(found * 3, leaves), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.usefixtures("_small_tiles")
def test_a_block_of_tokens_that_are_never_labels():
    hidden, labels = _tokens(2)
    bias = torch.zeros(VOCAB, dtype=torch.float64)
    bias[:4] = bias[9:] = -torch.inf  # a whole block, and a part of the last
    leaves = [hidden.requires_grad_(), _weight().T.detach().requires_grad_()]
    labels = labels.where(labels < 0, labels % 5 + 4)
    expected = F.cross_entropy(F.linear(hidden, leaves[1], bias).flatten(0, 1), labels.flatten())
    losses = [linear_cross_entropy(hidden, leaves[1], labels, bias=bias), expected]
    torch.testing.assert_close(*losses, rtol=1e-13, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves) for loss in losses), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("wrong", [-1, VOCAB, 10**9])
def test_a_label_that_is_no_word_of_the_head_is_refused(wrong):
    hidden, labels = _tokens(2)
    labels[0, 2] = wrong
    with pytest.raises(BatchError, match=rf"label {wrong} is none of the 11 words that the logits know; labels are 0 to 10"):
        linear_cross_entropy(hidden, _weight().T.detach(), labels)


@pytest.mark.parametrize("whole_logits", [False, True])
@pytest.mark.parametrize("num_labels", [None, 13])
def test_a_label_of_one_rank_that_is_no_word_is_refused_on_every_rank(num_labels, whole_logits, tmp_path):
    for message in on_ranks(3, _wrong_on_one, num_labels, whole_logits, tmp_path=tmp_path):
        assert message.startswith("label 11 is none of the 11 words")


def _wrong_on_one(num_labels, whole_logits):
    mesh, (hidden, labels) = ParallelMesh(), _tokens(2)
    labels[0, 2] = VOCAB if mesh.coordinate.data_rank == 1 else 4
    given = (hidden @ _weight(), labels) if whole_logits else (hidden, _weight().T.detach(), labels)
    loss = cross_entropy if whole_logits else linear_cross_entropy
    with pytest.raises(BatchError) as error:
        loss(*given, mesh=mesh, num_labels=num_labels)
    return str(error.value)


def test_more_tokens_and_words_than_one_block():
    generator = torch.Generator().manual_seed(0)
    tokens, words = losses_of.LOSS_TOKENS + 6, losses_of.LOSS_WORDS + 3
    leaves = [torch.randn(rows, 4, generator=generator, dtype=torch.float64).requires_grad_() for rows in (tokens, words)]
    labels = torch.randint(words, (tokens,), generator=generator)
    labels[:2] = torch.tensor([0, words - 1])
    losses = [linear_cross_entropy(*leaves, labels), F.cross_entropy(F.linear(*leaves), labels)]
    torch.testing.assert_close(*losses, rtol=1e-13, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves) for loss in losses), rtol=1e-12, atol=1e-15)


@pytest.mark.usefixtures("_small_tiles")
def test_a_chunked_loss_sums_the_gradient_of_a_half_precision_head_in_fp32():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 999, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCAB, (1, 999), generator=generator)
    errors = {}
    for dtype in (torch.float64, torch.bfloat16):
        weight = _weight(dtype).T.detach().requires_grad_()
        linear_cross_entropy(hidden.to(dtype), weight, labels).backward()
        errors[dtype] = weight.grad.double()
    whole = _weight(torch.bfloat16).T.detach().requires_grad_()
    cross_entropy(hidden.bfloat16() @ whole.T, labels).backward()
    tiled, untiled = ((grad.double() - errors[torch.float64]).norm() for grad in (errors[torch.bfloat16], whole.grad))
    assert tiled <= 1.5 * untiled


def test_under_autocast_a_chunked_loss_computes_in_its_dtype(monkeypatch):
    monkeypatch.setattr(products, "SLOW_ON_CPU", frozenset())
    hidden, labels = _tokens(2, torch.float32)
    weight = _weight(torch.float32).T.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, labels)
        expected = cross_entropy(F.linear(hidden, weight), labels)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    found.backward()
    assert weight.grad.dtype == torch.float32
    assert not torch.equal(found, linear_cross_entropy(hidden, weight, labels))


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_a_chunked_loss_without_a_label_is_zero_with_zero_gradients(shape):
    hidden, weight = torch.randn(*shape, 6, requires_grad=True), _weight().T.detach().float().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full(shape, -100))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("sharded", [False, True])
def test_over_ranks_a_chunked_loss_is_that_of_one_device(sharded, tmp_path):
    everyone = [_tokens(rank) for rank in range(3)]
    weight = _weight()
    hidden, labels = (torch.cat(pieces, 1) for pieces in zip(*everyone))
    expected = F.cross_entropy((hidden @ weight).flatten(0, 1), labels.flatten())
    expected.backward()
    losses, gradients = zip(*on_ranks(3, _tiled_over_ranks, sharded, tmp_path=tmp_path))
    assert losses == pytest.approx([expected.item()] * 3, rel=1e-14)
    mean = gradients[0] if sharded else sum(gradients) / 3
    torch.testing.assert_close(mean, weight.grad.T, rtol=1e-13, atol=1e-15)


def _tiled_over_ranks(sharded):
    losses_of.LOSS_TOKENS, losses_of.LOSS_WORDS = 3, 4  # of 11 words: the last block is smaller
    mesh, weight = ParallelMesh(), _weight().T.detach()
    weight = (distribute_tensor(weight, mesh.fsdp_mesh, [Shard(0)]) if sharded else weight).requires_grad_()
    hidden, labels = _tokens(mesh.coordinate.data_rank)
    loss = linear_cross_entropy(hidden, weight, labels, mesh=mesh)
    loss.backward()
    return loss.item(), weight.grad.full_tensor() if sharded else weight.grad


# ---- with the batch's BatchInfo: what it says is neither counted nor checked again


def _part():
    ids = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    return shard_local({"input_ids": ids, "labels": ids.where(ids > 2, -100)}, MeshCoordinate())


def test_with_the_batch_info_a_loss_reads_nothing_of_an_accelerator(monkeypatch):
    """On the meta device a value that the host reads, or a size that depends on values, raises."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # the meta device has no autocast
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: nullcontext())
    part = _part()
    info, labels = part["longspan"], part["shift_labels"].to("meta")
    hidden, weight = (torch.zeros(*shape, 6, device="meta").requires_grad_() for shape in [(2, 9), (VOCAB,)])
    linear_cross_entropy(hidden, weight, labels, longspan=info).backward()
    cross_entropy(hidden @ weight.T, labels, longspan=info).backward()
    assert hidden.grad.shape == (2, 9, 6)
    with pytest.raises(NotImplementedError):
        linear_cross_entropy(hidden, weight, labels)


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_labelled_rows_are_found_without_reading_how_many(density):
    wanted = torch.rand(50, generator=torch.Generator().manual_seed(1)) < density
    with patch.object(torch.Tensor, "device", torch.device("cuda")):
        found = labelled_rows(wanted, int(wanted.sum()))
    assert torch.equal(found, wanted.nonzero().flatten())


def test_the_batch_info_gives_the_divisor_and_refuses_labels_beyond_the_vocabulary():
    part = _part()
    info, labels, logits = part["longspan"], part["shift_labels"], torch.randn(2, 9, VOCAB)
    assert info.num_local_labels == info.num_labels == int((labels >= 0).sum()) > 0
    assert cross_entropy(logits, labels, longspan=info) == cross_entropy(logits, labels)
    assert cross_entropy(logits, labels, longspan=info, num_labels=3) == cross_entropy(logits, labels, num_labels=3)
    largest = info.largest_label
    with pytest.raises(BatchError, match=f"label {largest} is none of the {largest} words that the logits know"):
        cross_entropy(logits[..., :largest], labels, longspan=info)
    with pytest.raises(BatchError, match=f"label {largest} is none of the {largest} words that the logits know"):
        linear_cross_entropy(logits, torch.randn(largest, VOCAB), labels, longspan=info)
    with pytest.raises(BatchError, match="ignore_index=0 does not go with longspan="):
        linear_cross_entropy(logits, torch.randn(VOCAB, VOCAB), labels, longspan=info, ignore_index=0)


def test_over_ranks_only_the_sum_of_the_losses_is_reduced(tmp_path):
    for rank, (count, found, mine) in enumerate(on_ranks(2, _without_control, tmp_path=tmp_path)):
        assert count == 0
        assert found[0] == pytest.approx(found[1], rel=1e-6)
        assert mine == (4, 3)[rank]  # the last token of a row predicts nothing


def _without_control():
    mesh, generator = ParallelMesh(ulysses=2), torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (1, 8), generator=generator)
    part = shard_batch({"input_ids": ids, "labels": ids}, mesh)
    hidden, weight = (torch.randn(*shape, 6, generator=generator) for shape in [(1, 4), (VOCAB,)])
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce:
        loss = linear_cross_entropy(hidden, weight, part["shift_labels"], mesh=mesh, longspan=part["longspan"])
    found = loss.item(), linear_cross_entropy(hidden, weight, part["shift_labels"], mesh=mesh).item()
    return reduce.call_count, found, part["longspan"].num_local_labels


UNFIT = {
    "fewer labels": ({"labels": slice(0, 7)}, r"labels of shape \[1, 7\] do not stand beside .* \[1, 10, \d+\]; give each"),
    "fractions": ({"dtype": torch.float32}, r"labels are torch.float32, and the label of a token is an integer"),
    "a divisor below 0": ({"num_labels": -3}, r"num_labels=-3 is a number of labels; it must be 0 or more"),
    "a bias of another head": (
        {"bias": torch.zeros(VOCAB + 2)},
        r"bias of shape \[13\] does not fit a head of shape \[11, 6\]",
    ),
    "a softcap of 0": ({"softcap": 0.0}, r"softcap=0.0 must be above 0 and finite"),
    "more than the whole target": ({"label_smoothing": 1.5}, r"label_smoothing=1.5 is a share .* from 0 to 1"),
}


@pytest.mark.parametrize(("given", "text"), UNFIT.values(), ids=UNFIT)
@pytest.mark.parametrize("loss", [cross_entropy, linear_cross_entropy])
def test_labels_and_options_that_do_not_fit_are_refused_on_every_rank(loss, given, text, tmp_path):
    if loss is cross_entropy and given.keys() & {"bias", "softcap", "label_smoothing"}:
        return
    for message in on_ranks(2, _unfit_on_one, loss.__name__, given, tmp_path=tmp_path):
        assert re.match(text, message), message


def _unfit_on_one(name, given):
    mesh, (hidden, labels) = ParallelMesh(), _tokens(2)
    options = dict(given)
    cut, dtype = options.pop("labels", slice(None)), options.pop("dtype", torch.int64)
    if mesh.coordinate.data_rank == 1:
        labels = labels[:, cut].to(dtype)
    else:
        options = {}
    inputs = (hidden @ _weight(),) if name == "cross_entropy" else (hidden, _weight().T.detach())
    with pytest.raises(BatchError) as error:
        getattr(losses_of, name)(*inputs, labels, mesh=mesh, **options)
    return str(error.value)
