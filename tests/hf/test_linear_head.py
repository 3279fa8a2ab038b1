"""Which heads are linear, and the loss through those that are and those that are not."""

from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from longspan import MemoryOptions, ModelError, ParallelMesh, parallelize, shard_batch
from longspan.hf import load
from longspan.hf.adapter import PretrainedAdapter
from longspan.hf.chunked_loss import ChunkedLoss
from longspan.hf.linear_head import LinearHead
from tests.helpers.hf_models import BASE, assert_gradients, batches, build
from tests.helpers.memory_models import loss_alone, model_of
from tests.helpers.ranks import Ranks, mesh_of

CHUNKED = MemoryOptions(chunked_loss=True)


class Headed(LlamaForCausalLM):
    """A Llama whose logits a function of its own forms, as models of other people do."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gain = 1.0

    def logits_of(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden) * self.gain
        return logits

    def forward(self, *args: Any, labels: Tensor | None = None, **keywords: Any) -> Any:
        logits = self.logits_of(self.model(*args, **keywords).last_hidden_state)
        vocab = self.config.vocab_size
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, vocab_size=vocab, **keywords)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class LearnsAFactorForCausalLM(Headed):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gain = nn.Parameter(torch.ones(()))


class HasABufferForCausalLM(Headed):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        del self.gain
        self.register_buffer("gain", torch.ones(()))


class HalvesGradientsForCausalLM(Headed):
    def logits_of(self, hidden: Tensor) -> Tensor:
        return super().logits_of(0.5 * hidden + 0.5 * hidden.detach())


class UpcastsForCausalLM(Headed):
    def logits_of(self, hidden: Tensor) -> Tensor:
        return super().logits_of(hidden).float()


class ReadsTheEmbeddingForCausalLM(Headed):
    def logits_of(self, hidden: Tensor) -> Tensor:
        return super().logits_of(hidden) + hidden @ self.model.embed_tokens.weight.T


class SetForCausalLM(Headed):
    gain = 1.0

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        del self.gain


class HasAnUnusedParameterForCausalLM(Headed):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.unused = nn.Parameter(torch.ones(4))


class DetachesTheWeightForCausalLM(Headed):
    def logits_of(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.lm_head.weight.detach())


def headed(kind: type[Headed]) -> Headed:
    model = kind(build("llama").config).double()
    model.load_state_dict(build("llama").state_dict(), strict=False)
    return model.train()


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
    adapter.prove(ParallelMesh(), CHUNKED)
    return adapter._found(ChunkedLoss).head


def form_of(model: Any) -> tuple[str, float, float | None] | None:
    head = head_of(model)
    return None if head is None else (head.name, head.scale, head.softcap)


def test_a_head_is_linear_with_its_scale_and_softcap() -> None:
    assert form_of(build("llama")) == ("lm_head", 1.0, None)
    assert form_of(build("llama").bfloat16()) == ("lm_head", 1.0, None)
    assert form_of(build("gemma2")) == ("lm_head", 1.0, 6.0)
    assert form_of(build("gemma2", final_logit_softcapping=30.0)) == ("lm_head", 1.0, 30.0)
    assert form_of(GraniteForCausalLM(GraniteConfig(**BASE, logits_scaling=8.0))) == ("lm_head", 0.125, None)  # type: ignore[arg-type]
    assert form_of(CohereForCausalLM(CohereConfig(**BASE, logit_scale=0.3))) == ("lm_head", 0.3, None)  # type: ignore[arg-type]
    assert form_of(headed(UpcastsForCausalLM).bfloat16()) == ("lm_head", 1.0, None)


@pytest.mark.parametrize("more", [dropping, masking])
def test_a_head_with_more_around_it_is_not(more: Callable[[Any], None]) -> None:
    model = build("llama")
    more(model)
    assert head_of(model) is None


@pytest.mark.parametrize(
    "kind", [LearnsAFactorForCausalLM, HasABufferForCausalLM, HalvesGradientsForCausalLM, UpcastsForCausalLM]
)
def test_neither_is_one_with_a_factor_or_gradients_of_its_own(kind: type[Headed]) -> None:
    assert head_of(headed(kind)) is None


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("kind", [HasAnUnusedParameterForCausalLM, DetachesTheWeightForCausalLM])
def test_a_parameter_without_a_gradient_stays_without_one(kind: type[Headed], zero: int, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(without_a_gradient, kind, zero)


def without_a_gradient(kind: type[Headed], zero: int) -> None:
    mesh, reference, whole = mesh_of(2, 1), headed(kind), batches("a rank without labels", False)
    model = parallelize(deepcopy(reference), mesh, zero=zero, memory=CHUNKED)
    loss_alone(reference, "llama", whole).backward()
    model(**shard_batch(whole, mesh)).loss.backward()
    for parameter in reference.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    assert_gradients(model, reference, 1e-10)


@pytest.mark.parametrize("zero", [2, 3])
def test_weights_that_are_read_in_shards(zero: int, tmp_path: Path, pool: Callable[[int], Ranks]) -> None:
    build("llama").save_pretrained(tmp_path)
    pool(2).run(read_in_shards, zero, str(tmp_path))


def read_in_shards(zero: int, folder: str) -> None:
    mesh, reference, whole = mesh_of(2, 1), build("llama"), batches("odd length", False)
    model = parallelize(load(folder), mesh, zero=zero, memory=CHUNKED)
    loss_alone(reference, "llama", whole).backward()
    model(**shard_batch(whole, mesh)).loss.backward()
    assert_gradients(model, reference, 1e-10)


@pytest.mark.parametrize("option", ["scale_grad_by_freq", "sparse"])
def test_an_embedding_whose_gradient_depends_on_all_tokens_is_refused(option: str) -> None:
    model = build("llama")
    setattr(model.model.embed_tokens, option, True)
    with pytest.raises(ModelError, match=f"'model.embed_tokens' has {option}=True.*set it to False"):
        PretrainedAdapter(model, model).prove(ParallelMesh(), MemoryOptions())


def test_an_embedding_that_a_forward_changes_is_refused() -> None:
    model = build("llama")
    model.model.embed_tokens.max_norm = 1.5
    with pytest.raises(ModelError, match=r"'model.embed_tokens' has max_norm=1.5.*set it to None"):
        PretrainedAdapter(model, model).prove(ParallelMesh(), MemoryOptions())


def test_neither_is_one_in_another_dtype_than_the_hidden_states() -> None:
    model = headed(SetForCausalLM).bfloat16()
    model.lm_head.float().register_forward_pre_hook(lambda head, args: (args[0].to(head.weight.dtype),))
    assert head_of(model) is None


def test_neither_is_one_with_a_softcap_that_the_config_does_not_name() -> None:
    model = build("gemma2", final_logit_softcapping=30.0).bfloat16()  # in which 1 and tanh(1 / 30) * 30 are equal
    cap = model.lm_head.forward
    model.config.final_logit_softcapping = None
    model.lm_head.forward = lambda hidden: torch.tanh(cap(hidden) / 30) * 30
    assert head_of(model) is None


def test_a_config_with_words_for_numbers_is_none_of_the_head() -> None:
    config = MptConfig(vocab_size=97, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, logit_scale="inv_sqrt_d_model")
    assert form_of(MptForCausalLM(config)) == ("lm_head", 1.0, None)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: headed(ReadsTheEmbeddingForCausalLM), "multiplies by 'embed_tokens.weight'"),
        (lambda: OPTForCausalLM(OPTConfig(vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2, dropout=0.0,
         num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32)), "does not call its base model"),
    ],
)  # fmt: skip
def test_a_head_that_hidden_states_do_not_determine_is_refused(model: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ModelError, match=f"{reason}.*leave out chunked_loss=True"):
        head_of(model())


def hook_on_the_head(model: Any, seen: list[int]) -> Any:
    return model.lm_head.register_forward_hook(lambda head, args, logits: seen.append(logits[..., 0].numel()))


def hook_on_all_modules(model: Any, seen: list[int]) -> Any:
    def look(module: nn.Module, args: Any, output: Any) -> None:
        if module is model.lm_head:
            seen.append(output[..., 0].numel())

    return nn.modules.module.register_module_forward_hook(look)


def wrapped_forward(model: Any, seen: list[int]) -> Any:
    own = model.lm_head.forward

    @wraps(own)
    def counted(hidden: Tensor) -> Any:
        seen.append(hidden[..., 0].numel())
        return own(hidden)

    model.lm_head.forward = counted


@pytest.mark.parametrize("degrees", [{"ulysses": 2}, {"tensor": 2}], ids=str)
@pytest.mark.parametrize("watch", [hook_on_the_head, hook_on_all_modules, wrapped_forward])
def test_what_watches_the_head_sees_its_tokens(watch: Any, degrees: dict[str, int], pool: Callable[[int], Ranks]) -> None:
    if watch is wrapped_forward and "tensor" in degrees:
        pytest.skip("the forward of a head on the tensor axis is not the module's own")
    assert min(pool(2).run(watched, watch, degrees)) >= 1


def watched(watch: Any, degrees: dict[str, int]) -> int:
    """Loss and gradients are right while something watches the head; returns how many tokens it saw."""
    mesh, reference, whole, seen = ParallelMesh(**degrees), build("llama"), batches("odd length", False), list[int]()
    model = parallelize(deepcopy(reference), mesh, memory=CHUNKED)
    handle = watch(model, seen)
    expected = loss_alone(reference, "llama", whole)
    expected.backward()
    found = model(**shard_batch(whole, mesh)).loss
    found.backward()
    if handle is not None:
        handle.remove()
    assert abs(found.item() - expected.item()) <= 1e-10 * expected.item()
    assert_gradients(model, reference, 1e-10)
    return sum(seen)


@pytest.mark.parametrize("degrees", [{"ulysses": 2}, {"tensor": 2}], ids=str)
@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_its_logits_are_never_formed_by_the_model(
    name: str, zero: int, degrees: dict[str, int], pool: Callable[[int], Ranks]
) -> None:
    assert any(pool(2).run(in_blocks, name, zero, degrees))


def in_blocks(name: str, zero: int, degrees: dict[str, int]) -> bool:
    """Gradients are right, one rank without labels; returns whether this rank formed logits in blocks."""
    mesh, reference, whole = ParallelMesh(**degrees), build(name), batches("a rank without labels", False)
    model = parallelize(deepcopy(reference), mesh, zero=zero, memory=CHUNKED)
    loss_alone(reference, name, whole).backward()
    with patch.object(LinearHead, "terms", autospec=True, side_effect=LinearHead.terms) as terms:
        model(**shard_batch(whole, mesh)).loss.backward()
    assert_gradients(model, reference, 1e-5 if name == "gemma2" else 1e-10)
    return terms.called


def test_an_attribute_that_is_set_later_is_followed(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(set_later)


def set_later() -> None:
    mesh, reference, whole = mesh_of(2, 1), headed(SetForCausalLM), batches("odd length", False)
    model = parallelize(deepcopy(reference), mesh, memory=CHUNKED)
    reference.gain = model.gain = 2.0
    expected = loss_alone(reference, "llama", whole)
    expected.backward()
    found = model(**shard_batch(whole, mesh)).loss
    found.backward()
    assert abs(found.item() - expected.item()) <= 1e-10 * expected.item()
    assert_gradients(model, reference, 1e-10)


@pytest.mark.parametrize("degrees", [{"ulysses": 2}, {"tensor": 2}], ids=str)
@pytest.mark.parametrize("label", [97, -1])
@pytest.mark.parametrize("name", ["llama", "decoder"])
def test_a_label_beyond_the_vocabulary_has_no_loss(
    name: str, label: int, degrees: dict[str, int], pool: Callable[[int], Ranks]
) -> None:
    assert all(pool(2).run(unknown_label_later, name, label, degrees))


def unknown_label_later(name: str, label: int, degrees: dict[str, int]) -> bool:
    """Whether the loss is NaN where a label was written into the part that ``shard_batch`` gave."""
    mesh = ParallelMesh(**degrees)
    model = parallelize(model_of(name), mesh, memory=CHUNKED if name == "llama" else MemoryOptions())
    part = shard_batch(batches("even", False), mesh)
    part["shift_labels"][0, 1] = label
    return bool(model(**part).loss.isnan())


@pytest.mark.parametrize("zero", [0, 3])
def test_a_head_with_a_bias(zero: int, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(with_bias, zero)


def with_bias(zero: int) -> None:
    mesh, reference, whole = mesh_of(2, 1), build("llama"), batches("a rank without labels", False)
    bias: Tensor = torch.randn(97, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reference.lm_head.bias = nn.Parameter(bias)
    model = parallelize(deepcopy(reference), mesh, zero=zero, memory=CHUNKED)
    loss_alone(reference, "llama", whole).backward()
    model(**shard_batch(whole, mesh)).loss.backward()
    assert_gradients(model, reference, 1e-10)
