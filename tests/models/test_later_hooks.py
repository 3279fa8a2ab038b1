"""Hooks that are registered after ``parallelize``: those that read are followed, those that change tensors are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from longspan import LongspanError, parallelize, shard_batch
from tests.helpers.hf_models import build
from tests.helpers.ranks import Ranks, mesh_of

IDS = torch.randint(3, 97, (1, 23), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": IDS, "labels": IDS}


def in_place(module: nn.Module, args: Any, output: Tensor) -> None:
    output.add_(output.detach().cumsum(1))


def hook_layers(model: Any) -> dict[str, Any]:
    """Registers each hook that changes tensors when it is called: {the beginning of the refusal: how}."""
    mlp = model.model.layers[1].mlp
    return {
        "a forward hook of 'model.layers.1.mlp' that": lambda: mlp.register_forward_hook(lambda _, args, out: out.cumsum(1)),
        "a forward hook of 'model.layers.1.mlp.down_proj' that": lambda: mlp.down_proj.register_forward_hook(in_place),
        "a forward hook of the model that": lambda: model.register_forward_hook(lambda _, args, out: {**out, "loss": IDS}),
        "a forward pre-hook of 'model.layers.1.mlp' that": lambda: mlp.register_forward_pre_hook(lambda _, x: x[0].flip(1)),
        "a forward pre-hook of 'model.layers.1' that": lambda: model.model.layers[1].register_forward_pre_hook(
            lambda _, args, named: ((args[0] * 2, *args[1:]), named), with_kwargs=True
        ),
        "a forward pre-hook of the model was": lambda: model.register_forward_pre_hook(lambda _, args: None),
        "a backward hook of 'model.layers.1.mlp' that": lambda: mlp.register_full_backward_hook(
            lambda _, inwards, outwards: tuple(each.cumsum(1) for each in inwards)
        ),
        "a backward pre-hook of 'model.layers.1.mlp' that": lambda: mlp.register_full_backward_pre_hook(
            lambda _, outwards: tuple(each.cumsum(1) for each in outwards)
        ),
    }


def test_a_later_hook_that_changes_tensors_is_refused_on_every_rank(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(changing_hooks)


def changing_hooks() -> None:
    mesh = mesh_of(2)
    model = parallelize(build("llama"), mesh)
    part = shard_batch(BATCH, mesh)
    expected = model(**part).loss.item()
    for text, register in hook_layers(model).items():
        handle = register()
        for _ in range(2):
            with pytest.raises(LongspanError, match=f"^{text}.*registered after parallelize.*parallelize again"):
                model(**part).loss.backward()
        handle.remove()
        assert model(**part).loss.item() == expected


@pytest.mark.parametrize("zero", [0, 3])
def test_a_later_hook_that_reads_is_followed(zero: int, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(reading_hooks, zero)


def reading_hooks(zero: int) -> None:
    mesh = mesh_of(2)
    model = parallelize(build("llama"), mesh, zero=zero)
    part = shard_batch(BATCH, mesh)
    expected, seen = model(**part).loss.item(), []
    model.enable_input_require_grads()
    model.model.layers[0].mlp.register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    model.model.layers[0].mlp.register_forward_hook(lambda _, args, out: out)
    model.model.layers[0].register_forward_pre_hook(lambda _, args, named: (args, named), with_kwargs=True)
    model.register_forward_hook(lambda _, args, out: seen.append(out.loss.item()))
    model.lm_head.register_full_backward_hook(lambda _, inwards, outwards: seen.append("backward"))
    found = model(**part).loss
    found.backward()
    assert found.item() == expected
    assert seen == [len(part["longspan"].positions[0]), expected, "backward"]


def test_a_hook_that_was_there_before_is_part_of_the_proof(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(hooks_before)


def hooks_before() -> None:
    mesh, losses = mesh_of(2), []
    for parallel in (False, True):
        model = build("llama")
        model.model.layers[0].mlp.register_forward_hook(lambda _, args, out: out * 2)
        losses.append((parallelize(model, mesh) if parallel else model)(**(shard_batch(BATCH, mesh) if parallel else BATCH)))
    assert losses[1].loss.item() == pytest.approx(losses[0].loss.item(), rel=1e-6)
    model = build("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda _, args, out: out.cumsum(1))
    with pytest.raises(LongspanError, match=r"LlamaMLP 'model.layers.0.mlp' mixes tokens outside attention"):
        parallelize(model, mesh)


def test_a_function_of_a_class_or_modeling_file_that_is_replaced_is_refused(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(replaced_functions)


def replaced_functions() -> None:
    """As libraries of fused kernels replace them, for all models that are built later."""
    mesh = mesh_of(2)
    model = parallelize(build("llama"), mesh)
    part = shard_batch(BATCH, mesh)
    for owner, name, text in (
        (modeling_llama.LlamaMLP, "forward", r"LlamaMLP\.forward was replaced after parallelize"),
        (modeling_llama.LlamaForCausalLM, "forward", r"LlamaForCausalLM\.forward was replaced after parallelize"),
        (modeling_llama, "apply_rotary_pos_emb", r"modeling_llama\.apply_rotary_pos_emb was replaced after parallelize"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, lambda *args, **named: None)
            with pytest.raises(LongspanError, match=text):
                model(**part)
    model(**part)
