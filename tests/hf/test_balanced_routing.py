"""Every expert gets equally many tokens while routers are balanced, and their own choice returns after ``undo``."""

import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from longspan.hf.balanced_routing import Balanced


def test_every_expert_gets_equally_many_tokens() -> None:
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM._from_config(config)
    ids, chosen = torch.randint(64, (1, 32)), []
    routing = Balanced(model)
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, args, output: chosen.append(output[2].flatten().bincount(minlength=4)))
    even = model(input_ids=ids, labels=ids).loss
    assert routing.routers == 2
    assert [counts.tolist() for counts in chosen] == [[16, 16, 16, 16]] * 2
    even.backward()
    assert all(parameter.grad is not None for parameter in model.model.layers[0].mlp.experts.parameters())
    routing.undo()
    model(input_ids=ids)
    assert any(counts.tolist() != [16, 16, 16, 16] for counts in chosen[2:])


def test_a_dense_model_is_left_alone() -> None:
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = Qwen3ForCausalLM._from_config(config)
    routing = Balanced(model)
    model(input_ids=torch.randint(64, (1, 8)))
    assert (routing.experts, routing.routers) == (0, 0)
