"""Which heads are linear, and the loss through those that are and those that are not."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM

from longspan import MemoryOptions, ParallelMesh, parallelize, shard_batch
from longspan.hf.adapter import PretrainedAdapter
from longspan.hf.chunked_loss import ChunkedLoss
from longspan.hf.linear_head import LinearHead
from tests.helpers.hf_models import BASE, assert_gradients, batches, build
from tests.helpers.memory_models import loss_alone
from tests.helpers.ranks import Ranks, mesh_of


def dropping(model: Any) -> None:
    """Drop hidden states between the base model and the head, in training only."""
    head = model.lm_head
    head.register_forward_pre_hook(lambda head, args: (nn.functional.dropout(args[0], 0.5, head.training),))


def masking(model: Any) -> None:
    """Forbid one token, as models with tokens of images do."""
    model.lm_head.register_forward_hook(lambda head, args, logits: logits.index_fill(-1, torch.tensor([7]), -1e4))


def head_of(model: Any) -> LinearHead | None:
    """What the proof of ``chunked_loss`` finds out about the head of ``model``."""
    adapter = PretrainedAdapter(model, model)
    adapter.prove(ParallelMesh(), MemoryOptions(chunked_loss=True))
    return adapter._found(ChunkedLoss).head


def test_a_head_is_linear_with_its_scale_and_softcap() -> None:
    assert head_of(build("llama")) == LinearHead("lm_head", 1.0, None)
    assert head_of(build("llama").bfloat16()) == LinearHead("lm_head", 1.0, None)
    assert head_of(build("gemma2")) == LinearHead("lm_head", 1.0, 6.0)
    assert head_of(build("gemma2", final_logit_softcapping=30.0)) == LinearHead("lm_head", 1.0, 30.0)
    assert head_of(GraniteForCausalLM(GraniteConfig(**BASE, logits_scaling=8.0))) == LinearHead("lm_head", 0.125, None)  # type: ignore[arg-type]
    assert head_of(CohereForCausalLM(CohereConfig(**BASE, logit_scale=0.3))) == LinearHead("lm_head", 0.3, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [dropping, masking])
def test_a_head_with_more_around_it_is_not(more: Callable[[Any], None]) -> None:
    model = build("llama")
    more(model)
    assert head_of(model) is None


def test_neither_is_one_with_a_softcap_that_the_config_does_not_name() -> None:
    model = build("gemma2", final_logit_softcapping=30.0).bfloat16()  # in which 1 and tanh(1 / 30) * 30 are equal
    cap = model.lm_head.forward
    model.config.final_logit_softcapping = None
    model.lm_head.forward = lambda hidden: torch.tanh(cap(hidden) / 30) * 30
    assert head_of(model) is None


@pytest.mark.parametrize("degrees", [{"ulysses": 2}, {"tensor": 2}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_hook_on_the_head_is_called(name: str, degrees: dict[str, int], pool: Callable[[int], Ranks]) -> None:
    assert min(pool(2).run(hooked, name, degrees)) >= 1


def hooked(name: str, degrees: dict[str, int]) -> int:
    """Loss and gradients are right with a hook that looks at the logits; returns how many tokens it saw."""
    mesh, reference, whole, called = ParallelMesh(**degrees), build(name), batches("odd length", False), []
    model = parallelize(deepcopy(reference), mesh, memory=MemoryOptions(chunked_loss=True))
    model.lm_head.register_forward_hook(lambda head, args, logits: called.append(logits[..., 0].numel()))
    expected = loss_alone(reference, name, whole)
    expected.backward()
    found = model(**shard_batch(whole, mesh)).loss
    found.backward()
    assert abs(found.item() - expected.item()) <= 1e-5 * expected.item()
    assert_gradients(model, reference, 1e-5 if name == "gemma2" else 1e-10)
    return sum(called)


def test_a_head_with_a_bias(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(with_bias)


def with_bias() -> None:
    mesh, reference, whole = mesh_of(2, 1), build("llama"), batches("a rank without labels", False)
    bias: Tensor = torch.randn(97, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reference.lm_head.bias = nn.Parameter(bias)
    model = parallelize(deepcopy(reference), mesh, zero=3, memory=MemoryOptions(chunked_loss=True))
    loss_alone(reference, "llama", whole).backward()
    model(**shard_batch(whole, mesh)).loss.backward()
    assert_gradients(model, reference, 1e-10)
