"""Models that mix tokens outside attention are refused by the name of the module, unchanged."""

import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longspan import LongspanError, ParallelMesh, parallelize, shard_batch
from tests.helpers.hf_models import BASE, EXPERTS, assert_gradients, build, forward_alone, small
from tests.helpers.ranks import Ranks, mesh_of


def refused(build_it: Callable[[], Any]) -> str:
    model = build_it()
    before = deepcopy({name: parameter.detach() for name, parameter in model.named_parameters()})
    with pytest.raises(LongspanError) as error:
        parallelize(model, ParallelMesh())
    assert "_longspan" not in vars(model)
    assert model.config._attn_implementation != "longspan"
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    return str(error.value)


def counting_from_one() -> Any:
    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given = kwargs.get("position_ids")
        return args, kwargs | {"position_ids": 1 + torch.arange(kwargs["input_ids"].shape[1])[None] if given is None else given}

    model = build("llama")
    model.register_forward_pre_hook(count, with_kwargs=True)
    return model


class Normed(nn.Module):
    """A feed-forward behind which a batch norm stands, which is token-wise in evaluation mode alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm = inner, nn.BatchNorm1d(32, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.inner(x).flatten(0, 1)).view_as(x)
        return out


def with_batch_norm() -> Any:
    model = build("llama")
    model.model.layers[0].mlp = Normed(model.model.layers[0].mlp)
    return model


HYBRID = {
    **BASE, "head_dim": 8, **EXPERTS, "shared_expert_intermediate_size": 16, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("build_it", "text"),
    [
        (small("DogeConfig", "DogeForCausalLM", **BASE), "DogeForCausalLM works on its attention mask in its own code"),
        (small("MambaConfig", "MambaForCausalLM", vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=8),
         "Linear 'backbone.layers.0.mixer.* mixes tokens outside attention"),
        (small("Qwen3NextConfig", "Qwen3NextForCausalLM", **HYBRID), "linear_attn.* mixes tokens outside attention"),
        (with_batch_norm, "BatchNorm1d 'model.layers.0.mlp.norm' normalises over the tokens of a batch while it trains"),
        (counting_from_one, "does not count its positions 0, 1, 2"),
        (small("LlamaConfig", "LlamaForSequenceClassification", **BASE), "mixes tokens outside attention"),
        (small("DebertaConfig", "DebertaForMaskedLM", **BASE, relative_attention=True, pos_att_type="c2p"),
         "DisentangledSelfAttention attends in its own code and does .* which is no scaled dot-product attention"),
        (small("RwkvConfig", "RwkvForCausalLM", vocab_size=97, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
         "RwkvSelfAttention 'rwkv.* did not reach longspan: it computes no softmax attention"),
        (small("BertConfig", "BertModel", **BASE), "'output pooler_output' mixes tokens outside attention"),
        (small("LlamaConfig", "LlamaForCausalLM", **{**BASE, "vocab_size": 12}),
         "LlamaForCausalLM has a vocabulary of 12, of which .* are no special tokens; its proof needs 14 different ones"),
        (small("LlamaConfig", "LlamaForCausalLM", **BASE, index_topk=512), "config.index_topk says .* selects"),
    ],
)  # fmt: skip
def test_what_would_be_wrong_is_refused_by_name(build_it: Callable[[], Any], text: str) -> None:
    assert re.search(text, refused(build_it), re.DOTALL)


@pytest.mark.parametrize("vocab", [17, 31])
def test_a_small_vocabulary_is_proven_and_one_device(vocab: int, pool: Callable[[int], Ranks]) -> None:
    """Such as that of amino acids or characters."""
    pool(2).run(small_vocabulary, vocab)


def small_vocabulary(vocab: int) -> None:
    mesh, reference = mesh_of(2, 1), build("llama", vocab_size=vocab)
    ids = torch.randint(vocab, (2, 23), generator=torch.Generator().manual_seed(1))
    expected, _ = forward_alone(reference, whole := {"input_ids": ids, "labels": ids}, False)
    expected.backward()
    model = parallelize(build("llama", vocab_size=vocab), mesh)
    found = model(**shard_batch(whole, mesh)).loss
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    assert_gradients(model, reference, 1e-10)
