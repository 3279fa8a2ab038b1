"""Tensor parallelism of Hugging Face models by their own plans: exact, or refused by name; every style is known."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.integrations import tensor_parallel as transformers_styles

from longspan import LayoutError, LongspanError, MemoryOptions, ModelError, ParallelMesh, parallel_state, parallelize
from longspan.distributed import tensor_parallel
from longspan.hf.tensor_weights import HONOURED, REFUSED
from tests.helpers.hf_models import BASE, KINDS, assert_gradients, batches, build, forward_alone, forward_cut, small
from tests.helpers.ranks import Ranks

EXACT = ["llama", "qwen3", "gemma2", "mixtral", "qwen3_moe"]
MORE = ["qwen2", "mistral", "gemma3", "starcoder2", "gpt_neox", "llama, dynamic rope"]
BATCHES = ["odd length", "packed", "right padding", "a rank without labels"]
TENSOR, BOTH = {"tensor": 2}, {"tensor": 2, "ulysses": 2}


def test_every_style_of_transformers_is_honoured_or_refused() -> None:
    known = set(transformers_styles.ALL_PARALLEL_STYLES)
    assert known - HONOURED - REFUSED == set()
    assert not HONOURED & REFUSED


@pytest.mark.parametrize("name", EXACT)
def test_it_is_one_device(name: str, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(equals_one_device, name, TENSOR, 0, "odd length", MemoryOptions(), {})
    pool(4).run(equals_one_device, name, BOTH, 3, "packed", MemoryOptions(recompute="full"), {})


@pytest.mark.long
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("degrees", "zero"), [(TENSOR, 0), (BOTH, 0), (BOTH, 2), ({"tensor": 2, "ring": 2}, 2)], ids=str)
@pytest.mark.parametrize("name", EXACT + MORE)
def test_it_is_one_device_for_every_batch(
    name: str, degrees: dict[str, int], batch: str, zero: int, pool: Callable[[int], Ranks]
) -> None:
    pool(4).run(equals_one_device, name, degrees, zero, batch, MemoryOptions(recompute="selective"), {})


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_key_value_head_that_both_ranks_hold(name: str, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(equals_one_device, name, TENSOR, 0, "odd length", MemoryOptions(), {"num_key_value_heads": 1})


def test_biases_of_rows_and_columns(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(
        equals_one_device, "llama", TENSOR, 2, "odd length", MemoryOptions(), {"attention_bias": True, "mlp_bias": True}
    )


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_half_precision_is_cut_too(name: str, pool: Callable[[int], Ranks]) -> None:
    """The proofs allow for the rounding of the model's dtype."""
    pool(2).run(half_precision, name)


def half_precision(name: str) -> None:
    mesh, reference, model = ParallelMesh(tensor=2), build(name).bfloat16(), build(name).bfloat16()
    parallelize(model, mesh)
    whole = batches("odd length", False)
    loss, _ = forward_cut(model, whole, False, mesh, False)
    expected, _ = forward_alone(reference, whole, False)
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)


def test_a_bias_that_is_added_twice_is_seen(pool: Callable[[int], Ranks]) -> None:
    with pytest.raises(AssertionError, match="not close"):
        pool(2).run(bias_added_twice)


def bias_added_twice() -> None:
    """A row-parallel module adds its bias to its partial sum, and once more behind the reduce-scatter."""
    show = tensor_parallel._show
    tensor_parallel._show = lambda uses, *more: show([replace(use, is_late=False) for use in uses], *more)
    try:
        equals_one_device("llama", TENSOR, 0, "odd length", MemoryOptions(), {"attention_bias": True, "mlp_bias": True})
    finally:
        tensor_parallel._show = show


def equals_one_device(
    name: str, degrees: dict[str, int], zero: int, batch: str, memory: MemoryOptions, config: dict[str, Any]
) -> None:
    mesh, reference, model = ParallelMesh(**degrees), build(name, **config), build(name, **config)
    for each in (reference, model):
        for parameter_name, parameter in each.named_parameters():
            if parameter_name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(5))
    parallelize(model, mesh, zero=zero, memory=memory)
    state, whole = parallel_state(model), batches(batch, False)
    assert state is not None
    loss, logits = forward_alone(reference, whole, False)
    seen = whole.get("attention_mask", torch.ones_like(whole["input_ids"]))[..., None]
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=logits.dtype) * seen
    (loss + (logits * weight).mean()).backward()
    my_loss, my_logits = forward_cut(model, whole, False, mesh, state.adapter.computes_loss())
    (my_loss + (my_logits * weight).mean()).backward()
    torch.testing.assert_close(my_loss, loss, rtol=1e-5, atol=1e-6)  # Transformers forms its loss in fp32
    # With a key/value head on two ranks Qwen3's norm of keys, which is fp32, has a rounded partial gradient on each.
    rounded = name == "qwen3" and "num_key_value_heads" in config
    assert_gradients(model, reference, 1e-5 if rounded else max(KINDS[name].tolerance, 2e-5 * (KINDS[name].tolerance > 1e-9)))


REFUSALS = [
    ("gpt_oss", TENSOR, {}, "GptOssForCausalLM has no base_model_tp_plan|GptOssForCausalLM wants .* 'embedding_rowwise'"),
    (
        "olmo2",
        TENSOR,
        {},
        r"'model.layers.0.self_attn.q_proj' cut in the style 'colwise_gather_output', which is not supported",
    ),
    ("phi3, longrope", TENSOR, {}, r"'model.layers.0.self_attn.o_proj' cut in the style 'rowwise_split_input'"),
    ("deepseek_v3", TENSOR, {}, "the model's plan cuts nothing of attention 'model.layers.0.self_attn'"),
    ("mixtral", TENSOR, {"output_router_logits": True}, "balance loss of its experts"),
    ("llama", {"tensor": 4}, {"hidden_size": 24, "num_key_value_heads": 3, "num_attention_heads": 6}, "tensor=4 cannot divide"),
    ("llama", {"tensor": 2, "ulysses": 2}, {"num_attention_heads": 2, "num_key_value_heads": 2}, "ulysses=2 exceeds the 1"),
]


@pytest.mark.parametrize(("name", "degrees", "config", "text"), REFUSALS, ids=lambda value: str(value)[:30])
def test_what_is_not_exact_is_refused(
    name: str, degrees: dict[str, int], config: dict[str, Any], text: str, pool: Callable[[int], Ranks]
) -> None:
    pool(4).run(refused, name, degrees, config, text)


def refused(name: str, degrees: dict[str, int], config: dict[str, Any], text: str) -> None:
    mesh, model = ParallelMesh(**degrees), build(name, **config)
    with pytest.raises((ModelError, LayoutError), match=text):
        parallelize(model, mesh)


def test_lora_is_refused(pool: Callable[[int], Ranks]) -> None:
    pytest.importorskip("peft")
    pool(2).run(lora_refused)


def lora_refused() -> None:
    import peft

    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(LongspanError, match="is wrapped by peft"):
        parallelize(model, ParallelMesh(tensor=2))


def test_a_shared_expert_that_the_plan_does_not_cut_is_refused(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(shared_expert_refused)


def shared_expert_refused() -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    model = small("Qwen2MoeConfig", "Qwen2MoeForCausalLM", **BASE, **experts)()
    with pytest.raises(ModelError, match=r"'model.layers.\d.mlp' adds something that the model's plan does not cut"):
        parallelize(model, ParallelMesh(tensor=2))


def test_weights_that_are_read_outside_of_their_module_are_refused(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(reads_outside)


def reads_outside() -> None:
    model = build("llama")
    for layer in model.model.layers:
        before, after = layer.input_layernorm, layer.post_attention_layernorm
        before.register_forward_hook(lambda module, args, output, other=after: output * other.weight)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ModelError, match="reads weights outside of the modules that own them"):
        parallelize(model, ParallelMesh(tensor=2))
    assert [name for name, _ in model.named_parameters()] == names
    assert all(parameter.numel() for parameter in model.parameters())
