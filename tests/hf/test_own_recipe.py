"""What the terms of an attention mean: its operands, scale, mask and slopes, against the attention computed as written."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longspan.hf.own_recipe import read_recipe
from longspan.hf.own_scores import Attention, RecordScores
from longspan.masks.constructors import Causal, Full, Window

HEADS, TOKENS, DIM = 4, 14, 8
Q, K, V = (
    torch.randn(1, HEADS, TOKENS, DIM, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in range(3)
)
BELOW = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
BUFFER = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril().triu(-20)
HIDDEN = torch.zeros(TOKENS, TOKENS, dtype=torch.float64).masked_fill(~BELOW, float("-inf"))
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.7], dtype=torch.float64)
ALIBI = SLOPES.view(HEADS, 1, 1) * torch.arange(TOKENS)


def scores() -> Any:
    return torch.matmul(Q, K.transpose(-1, -2))


def weighed(scores: Any) -> Tensor:
    return torch.matmul(torch.softmax(scores, -1), V)


CODES: dict[str, tuple[Any, Any]] = {
    "causal": (lambda: weighed(scores() / 3 + HIDDEN), Causal()),
    "both directions": (lambda: weighed(scores() * 0.3), Full()),
    "a window of a buffer": (lambda: weighed(torch.where(BUFFER[:, :, :TOKENS, :TOKENS], scores(), -1e9)), Window(20)),
    "scaled by a tensor": (lambda: weighed(scores() * (SLOPES + 0.1).view(1, HEADS, 1, 1) + HIDDEN), Causal()),
    "capped": (lambda: weighed(torch.tanh(scores() / 5) * 5 + HIDDEN), Causal()),
    "gates": (lambda: weighed(scores() * BELOW.double() - 1e4 * (1 - BELOW.double())), Causal()),
    "ALiBi": (lambda: weighed((scores() + ALIBI) / 2 + HIDDEN), Causal()),
    "ALiBi and a mask in one": (lambda: weighed(scores() + (ALIBI + HIDDEN)), Causal()),
}


@pytest.mark.parametrize("name", CODES)
def test_the_recipe_computes_what_is_written(name: str) -> None:
    code, own = CODES[name]
    found: list[Attention] = []
    with RecordScores("Own", lambda attention: found.append(attention) or attention.v):  # type: ignore[func-returns-value]
        code()
    recipe, mask = read_recipe(nn.Identity(), found[0], ())
    assert mask.mask == own
    q, k, v = (x.transpose(1, 2) for x in recipe.operands(found[0]))
    scale, softcap = recipe.scale_and_softcap(found[0].terms)
    logits = q @ k.transpose(-1, -2) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    if recipe.slopes is not None:
        logits = logits + recipe.slopes[:, None, None] * (torch.arange(TOKENS) - torch.arange(TOKENS).unsqueeze(1))
    seen = mask.shown(TOKENS, TOKENS)
    torch.testing.assert_close(logits.masked_fill(~seen, float("-inf")).softmax(-1) @ v, code(), rtol=1e-9, atol=1e-9)
