import pytest
import torch
import torch.nn.functional as F

from longspan.loss import cross_entropy
from longspan.mesh import ParallelMesh
from ranks import on_ranks

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


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
@pytest.mark.parametrize("labelled", [None, 0, 4])
def test_without_a_label_it_is_zero_with_zero_gradients(shape, labelled):
    logits = torch.randn(*shape, VOCAB, requires_grad=True)
    loss = cross_entropy(logits, torch.full(shape, -100), labelled=labelled)
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


def _loss_and_gradient(labelled):
    """The loss with the labels counted, given, and as a sum over micro-batches; the gradient of all three."""
    mesh, weight = ParallelMesh(), _weight()
    hidden, labels = _tokens(mesh.place.data_rank)
    logits = hidden @ weight
    micro = [
        cross_entropy(some_logits, some_labels, mesh=mesh, labelled=labelled)
        for some_logits, some_labels in zip(logits.tensor_split(3, 1), labels.tensor_split(3, 1))
    ]
    losses = [
        cross_entropy(logits, labels, mesh=mesh),
        cross_entropy(logits, labels, mesh=mesh, labelled=labelled),
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
