"""Scores are recorded, not computed: each term of an attention in a module's own code, in order."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longspan import ModelError
from longspan.hf.own_scores import Attention, Recorded, RecordScores

Q, K, V = (torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
BELOW = torch.ones(5, 5, dtype=torch.bool).tril()
FLOOR = torch.finfo(torch.float32).min


def recorded(code: Any) -> tuple[list[Attention], Tensor]:
    found: list[Attention] = []

    def finish(attention: Attention) -> Tensor:
        found.append(attention)
        return torch.matmul(attention.q, attention.q.transpose(-1, -2))[..., :1].expand(attention.v.shape)  # a product within

    with RecordScores("Own", finish):
        out = code()
    return found, out


def scaled_and_masked() -> Tensor:
    scores = torch.matmul(Q, K.transpose(-1, -2)) / math.sqrt(8)
    scores = torch.where(BELOW, scores, torch.full((), FLOOR))
    return torch.softmax(scores.float(), dim=-1).to(V.dtype) @ V


def of_flat_heads() -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (Q, K, V))
    scores = torch.zeros(8, 1, 5).baddbmm(q, k.transpose(1, 2), beta=1.0, alpha=0.25)
    scores = scores.view(2, 4, 5, 5) + torch.zeros(5)
    scores = torch.max(scores, torch.full((), FLOOR)).view(8, 5, 5)
    assert scores.size() == (8, 5, 5)
    return torch.bmm(nn.functional.dropout(nn.functional.softmax(scores, dim=-1), p=0.5, training=False), v)


def capped_in_place() -> Tensor:
    scores = torch.matmul(Q, K.transpose(-1, -2))
    scores *= 0.5
    scores = 3.0 * torch.tanh(scores)
    scores.masked_fill_((~BELOW).view(1, 1, 5, 5).expand_as(scores), FLOOR)
    return torch.matmul(scores.softmax(-1), V)


@pytest.mark.parametrize(
    ("code", "kinds"),
    [
        (scaled_and_masked, ["scale", "show"]),
        (of_flat_heads, ["scale", "add", "add"]),
        (capped_in_place, ["scale", "cap", "scale", "hide"]),
        (lambda: nn.functional.scaled_dot_product_attention(Q, K, V, is_causal=True), ["scale", "show"]),
    ],
)
def test_terms_are_recorded_in_order(code: Any, kinds: list[str]) -> None:
    (attention,), out = recorded(code)
    assert [term.kind for term in attention.terms] == kinds
    assert out.shape == attention.v.shape
    assert torch.equal(attention.q.reshape(Q.shape), Q)
    assert torch.equal(attention.k.reshape(K.shape), K)


@pytest.mark.parametrize("turned", [False, True])
def test_alpha_is_the_factor_of_the_second_of_a_sum(turned: bool) -> None:
    bias = torch.randn(5, 5, generator=torch.Generator().manual_seed(3))

    def code() -> Tensor:
        scores = torch.matmul(Q, K.transpose(-1, -2))
        terms = (bias, scores) if turned else (scores, bias)
        return torch.matmul(torch.add(*terms, alpha=0.5).softmax(-1), V)

    (attention,), _ = recorded(code)
    found = [(term.kind, term.value) for term in attention.terms]
    if turned:
        (scale, half), (add, value) = found
        assert (scale, half, add) == ("scale", 0.5, "add")
        assert torch.equal(value, bias)
    else:
        ((add, value),) = found
        assert add == "add"
        assert torch.equal(value, bias * 0.5)


def test_products_of_two_dims_and_what_follows_stay_computed() -> None:
    found, out = recorded(lambda: Q.reshape(-1, 8) @ K.reshape(-1, 8).T)
    assert found == []
    assert torch.equal(out, Q.reshape(-1, 8) @ K.reshape(-1, 8).T)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (lambda s: s.exp(), "Own attends in its own code and does exp with its scores"),
        (lambda s: torch.sub(s, 1, alpha=2), "does sub with alpha with its scores"),
        (lambda s: s.softmax(1), "does softmax over dim 1 with its scores"),
        (lambda s: s.view(2, 4, 25), r"does view to \[2, 4, 25\] with its scores"),
        (lambda s: s.softmax(-1) * 2, "does mul with its probabilities"),
        (lambda s: s.masked_fill(BELOW, 0.0), "does masked_fill with 0.0 with its scores"),
    ],
)
def test_any_other_use_is_refused(code: Any, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        recorded(lambda: code(torch.matmul(Q, K.transpose(-1, -2))))


def test_a_module_gets_its_forward_back() -> None:
    module = nn.Linear(8, 8)
    once = Recorded(module, lambda module, attention: attention.v)
    assert "forward" in vars(module)
    assert module(torch.ones(8)).shape == (8,)
    once.remove()
    assert "forward" not in vars(module)
