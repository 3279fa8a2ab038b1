"""Modules and config fields of Transformers are recognised by their names, where no type tells."""

from typing import Any

import pytest
from torch import nn
from transformers import GptOssConfig, LlamaConfig, MixtralConfig
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from longspan.hf import names
from tests.helpers.encoder_decoders import build_pair
from tests.helpers.hf_models import build

LLAMA = LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (LlamaAttention(LLAMA, 0), "attention"),
        (LlamaRMSNorm(8), "norm"),
        (nn.LayerNorm(8), "norm"),
        (BartLearnedPositionalEmbedding(9, 8), "position table"),
        (LlamaMLP(LLAMA), None),
        (nn.Linear(8, 8), None),
    ],
)
def test_a_module_is_of_one_kind_or_none(module: nn.Module, kind: str | None) -> None:
    tests = {"attention": names.is_attention, "norm": names.is_norm, "position table": names.is_position_table}
    assert [name for name, test in tests.items() if test(module)] == ([kind] if kind else [])


def test_a_table_that_counts_positions_itself_is_not_given_them() -> None:
    class CountingPositionalEmbedding(nn.Embedding):
        def forward(self, input_ids: Any) -> Any:
            return super().forward(input_ids)

    assert not names.is_position_table(CountingPositionalEmbedding(9, 8))


def test_two_rows_of_tokens_are_those_of_an_encoder_and_a_decoder() -> None:
    assert names.is_encoder_decoder(build_pair("bart"))
    assert not names.is_encoder_decoder(build("llama"))
    assert not names.is_encoder_decoder(build("bert"))


def test_fields_of_dropout_are_those_of_a_language_model() -> None:
    fields = (
        "attention_dropout",
        "resid_pdrop",
        "hidden_dropout_prob",
        "classifier_dropout",
        "summary_first_dropout",
        "decoder_layerdrop",
    )
    assert [name for name in fields if names.is_dropout_field(name)] == list(fields[:3])
    assert [name for name in fields if names.is_layerdrop_field(name)] == ["decoder_layerdrop"]


def test_experts_are_counted() -> None:
    assert names.number_of_experts(MixtralConfig(num_local_experts=4)) == 4
    assert names.number_of_experts(GptOssConfig(num_local_experts=6)) == 6
    assert names.number_of_experts(LLAMA) == 0
