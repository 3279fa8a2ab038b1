"""Adapters of peft on frozen and quantised bases: one device, or a refusal."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longspan import ModelError, ParallelMesh, parallelize, shard_batch, unparallelize
from longspan.hf import save
from tests.helpers.hf_models import assert_gradients, batches, build, forward_alone
from tests.helpers.ranks import Ranks, mesh_of


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
    model = parallelize(deepcopy(reference), mesh, zero=zero)
    trained = [[p for p in m.parameters() if p.requires_grad] for m in (reference, model)]
    optimizers = [torch.optim.AdamW(parameters, lr=1e-2) for parameters in trained]
    for _ in range(2):
        expected, _ = forward_alone(reference, whole, False)
        expected.backward()
        part = shard_batch(whole, mesh)
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


class Int8Linear(nn.Module):
    """A frozen linear layer of 8-bit weights, as quantised bases have them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale)


def quantised() -> Any:
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = Int8Linear(layer.mlp.down_proj)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def test_adapters_on_a_quantised_base_are_one_device(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(adapters_on_quantised)
    with pytest.raises(ModelError, match=r"zero=3 would shard '.*layers.0.mlp.down_proj.weight' of torch.int8"):
        parallelize(quantised(), ParallelMesh(), zero=3)


def adapters_on_quantised() -> None:
    mesh, whole, reference = mesh_of(2, 1), batches("odd length", False), quantised()
    model = parallelize(deepcopy(reference), mesh)
    forward_alone(reference, whole, False)[0].backward()
    model(**shard_batch(whole, mesh)).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    for mine, one in zip(trained, (p for p in reference.parameters() if p.requires_grad)):
        torch.testing.assert_close(mine.grad, one.grad, rtol=1e-9, atol=1e-12)


def adapters_saved(zero: int, folder: Path) -> None:
    """What the refusal of ``longspan.hf.save`` says, done: the adapters on another base generate as those on one device."""
    mesh, reference = mesh_of(2), adapted(lora()).eval()
    model = parallelize(adapted(lora()), mesh, zero=zero)
    with pytest.raises(ModelError, match=r"does not know the names .* model\.save_pretrained\(folder, state_dict=whole\)"):
        save(model, folder / "refused", mesh)
    with pytest.raises(ModelError, match="does not know the names of weights behind peft's adapters"):
        save(model.get_base_model(), folder / "refused", mesh)
    assert not (folder / "refused").exists()
    whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in model.state_dict().items()}
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "adapters", state_dict=whole)
        loaded = peft.PeftModel.from_pretrained(build("llama"), folder / "adapters").eval()
        ids = torch.arange(3, 19).reshape(2, 8)
        torch.testing.assert_close(loaded(input_ids=ids).logits, reference(input_ids=ids).logits)


@pytest.mark.parametrize("zero", [0, 3])
def test_adapters_are_not_saved_as_a_model_but_by_peft(zero: int, pool: Callable[[int], Ranks], tmp_path: Path) -> None:
    pool(2).run(adapters_saved, zero, tmp_path)
