"""Compares a small Hugging Face model over the ranks of a mesh with the same model on one device."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longspan import ParallelMesh, parallelize, shard_batch, unshard

VOCAB = 61


def assert_as_one_device(mesh: ParallelMesh, batch: dict[str, Any], alone: dict[str, Any], **keywords: Any) -> None:
    """Assert equal loss plus randomly weighted sum of the logits, and equal gradients of it. Every rank must call it.

    Args:
        mesh: the ranks.
        batch: the whole batch for ``shard_batch``.
        alone: the batch for the model on one device, with the same rows; if it is shorter, only its tokens are compared.
        keywords: further arguments of ``shard_batch``.
    """
    model, parallel = llama(), parallelize(llama(), mesh)
    expected = model(**alone)
    rows, tokens = alone["input_ids"].shape
    weights = torch.randn(rows, tokens, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    output = parallel(**shard_batch(batch, mesh, **keywords))
    logits = unshard(output.logits, mesh, tokens=batch["input_ids"].shape[1])[:, :tokens]
    totals = [one.loss + (whole * weights).sum() for one, whole in ((expected, expected.logits), (output, logits))]
    torch.testing.assert_close(totals[1], totals[0], rtol=1e-6, atol=1e-6)  # Transformers forms its loss in fp32
    for total in totals:
        total.backward()
    for (name, p), q in zip(model.named_parameters(), parallel.parameters()):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-6, atol=1e-6, msg=f"the gradient of {name} differs")


def llama() -> Any:
    """A llama of two layers in fp64, with the same random weights in every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()
