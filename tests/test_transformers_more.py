"""Law 1 for what people put on and around Hugging Face models: adapters, balance losses, compilers, half precision."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn

from longspan import ModelError, ParallelMesh, parallelize, shard, unparallelize
from ranks import Ranks
from test_transformers import assert_gradients, batches, build, forward_alone, mesh_of


@pytest.fixture(autouse=True)
def _leave_no_group_behind() -> Iterator[None]:
    """Ranks that are forked later would inherit the world of one that a ``ParallelMesh()`` makes here."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- adapters


def adapted(config: Any) -> Any:
    """A tiny llama in peft's wrapper, its base frozen and its new adapters not at zero."""
    torch.manual_seed(1)
    model = peft.get_peft_model(build("llama"), config)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def lora(**more: Any) -> Any:
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **more)


@pytest.mark.parametrize("zero", [0, 3])
def test_lora_on_a_frozen_base_is_one_device(zero: int, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(adapters, zero)


def adapters(zero: int) -> None:
    """Two steps of AdamW on the adapters and a head that is trained whole, then back to one device."""
    mesh, whole = mesh_of(2, 1), batches("odd length", False)
    reference = adapted(lora(modules_to_save=["lm_head"]))
    model = parallelize(deepcopy(reference), mesh, zero)
    trained = [[p for p in m.parameters() if p.requires_grad] for m in (reference, model)]
    optimizers = [torch.optim.AdamW(parameters, lr=1e-2) for parameters in trained]
    for _ in range(2):
        expected, _ = forward_alone(reference, whole, False)
        expected.backward()
        part = shard(whole, mesh)
        found = model(**part).loss
        found.backward()
        assert found.item() == pytest.approx(expected.item(), rel=1e-9)
        assert_gradients(model, reference, 1e-9)
        assert {name for name, p in model.named_parameters() if p.grad is not None} == {
            name for name, p in reference.named_parameters() if p.requires_grad
        }
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if zero == 0:
        alone, _ = forward_alone(unparallelize(model), whole, False)
        assert alone.item() == pytest.approx(forward_alone(reference, whole, False)[0].item(), rel=1e-9)
        assert model.config._attn_implementation == model.get_base_model().config._attn_implementation != "longspan"


def test_a_new_adapter_whose_zeros_hide_what_it_mixes_is_refused() -> None:
    model = peft.get_peft_model(build("llama"), lora())
    mixing = model.base_model.model.model.layers[1].self_attn.v_proj.lora_A["default"]
    mixing.register_forward_hook(lambda module, args, output: output.cumsum(1))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ModelError, match=r"layers.1.self_attn.v_proj.lora_A.default' mixes tokens"):
        parallelize(model, ParallelMesh())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "puts learned tokens before the sequence"),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "puts learned tokens before the sequence"),
        (lora(alora_invocation_tokens=[5, 6]), "looks for in the whole sequence"),
    ],
)
def test_adapters_that_mean_the_whole_sequence_are_refused(config: Any, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        parallelize(peft.get_peft_model(build("llama"), config), ParallelMesh())
