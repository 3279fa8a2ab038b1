"""A folder of Transformers as the model of a run: what it says of itself, and which folders and tokenizers it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, MixtralConfig, Qwen2Config

from longspan import ModelError
from longspan.hf.source import FolderSource, config_of, read

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4,
}  # fmt: skip


def written(config: Any, kind: str, folder: Path) -> str:
    config.architectures = [kind]
    config.save_pretrained(folder)
    return str(folder)


def test_a_folder_is_cut_to_its_first_layers(tmp_path: Path) -> None:
    windows = Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    folder = written(windows, "Qwen2ForCausalLM", tmp_path)
    assert read(folder).config.layer_types == ["full_attention", "sliding_attention"]
    one = read(folder, layers=1)
    assert one.config.layer_types == ["full_attention"]
    assert len(one.outline.model.layers) == 1
    assert one.summary.startswith("Qwen2ForCausalLM, 1 layers, 4 query heads")
    with pytest.raises(ModelError, match="layers=3 is more than the 2 of"):
        read(folder, layers=3)


def test_a_folder_without_a_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a LlamaForSequenceClassification, which is no language model"):
        read(written(LlamaConfig(**SHAPE), "LlamaForSequenceClassification", tmp_path))


def test_a_masked_model_predicts_in_place_and_does_not_train_on_the_next_token(tmp_path: Path) -> None:
    causal = read(written(LlamaConfig(**SHAPE), "LlamaForCausalLM", tmp_path / "causal"))
    masked = read(written(BertConfig(**SHAPE), "BertForMaskedLM", tmp_path / "masked"))
    assert (causal.in_place, masked.in_place) == (False, True)
    assert causal.for_text("bytes", 97) is causal
    with pytest.raises(ModelError, match="BertForMaskedLM predicts masked tokens, and this needs the next one"):
        masked.for_text("bytes", 97)


def test_what_a_run_cannot_train_is_refused(tmp_path: Path) -> None:
    source = read(written(LlamaConfig(**SHAPE, attention_dropout=0.1), "LlamaForCausalLM", tmp_path))
    with pytest.raises(ModelError, match="the tokenizer big has 98 tokens, more than the 97 that LlamaForCausalLM knows"):
        source.for_text("big", 98)
    with pytest.raises(ModelError, match=r"would drop activations in training \(config.attention_dropout\).*set it to 0"):
        source.for_training(8, "none")


def test_special_tokens_are_numbers_or_lists_of_them() -> None:
    source = FolderSource(LlamaConfig(**SHAPE, pad_token_id=None, bos_token_id=1, eos_token_id=[2, 5]), None)
    assert source.special == {1, 2, 5}


def test_a_description_of_an_unknown_kind_is_refused_with_the_version() -> None:
    described = FolderSource(LlamaConfig(**SHAPE), None).described()
    assert config_of(described).to_dict()["hidden_size"] == 32
    with pytest.raises(ModelError, match=r"the model is a of_tomorrow, which Transformers .* does not know"):
        config_of(described | {"model_type": "of_tomorrow"})


def test_experts_in_fp64_are_multiplied_one_by_one() -> None:
    source = FolderSource(MixtralConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1), None)
    model: Any = source.build(0, dtype=torch.float64)
    ids = torch.ones(1, 4, dtype=torch.long)
    assert model(input_ids=ids).logits.dtype == torch.float64
    assert model.config._experts_implementation == "eager"


@pytest.mark.parametrize(
    ("rope", "reach"),
    [
        ({"rope_type": "default"}, 100),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}, 400),
        ({"rope_type": "linear", "factor": 2.0}, 200),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 10, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0}, 100),
        ({"rope_type": "dynamic", "factor": 2.0}, None),
    ],
)  # fmt: skip
def test_the_reach_is_what_the_rope_was_made_for(rope: dict[str, Any], reach: int | None) -> None:
    source = FolderSource(LlamaConfig(**SHAPE, max_position_embeddings=100, rope_parameters={"rope_theta": 1e4, **rope}), None)
    assert source.reach == reach
    assert source.for_training(reach or 10_000, "none") is source
    if reach is not None and rope["rope_type"] != "default":
        with pytest.raises(
            ModelError, match=f"tokens={reach + 1} is more than the {reach} .* or fewer; its RoPE is scaled already"
        ):
            source.for_training(reach + 1, "yarn")


def test_the_reach_of_positions_that_are_no_rope_is_none() -> None:
    assert FolderSource(GPT2Config(), None).reach is None


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_a_rope_is_scaled_to_the_tokens_and_described_so(kind: str) -> None:
    config = LlamaConfig(**SHAPE, max_position_embeddings=100)
    source = FolderSource(config, None)
    scaled = source.for_training(250, kind)
    assert (source.reach, scaled.reach) == (100, 250)
    assert source.config.rope_parameters["rope_type"] == "default"  # as it was
    again = FolderSource(config_of(json.loads(json.dumps(scaled.described()))), None)
    reference = LlamaConfig(
        **SHAPE, max_position_embeddings=250,
        rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": 2.5, "original_max_position_embeddings": 100},
    )  # fmt: skip
    for model in (scaled.build(0), again.build(0)):
        assert model.config.max_position_embeddings == 250
        assert torch.equal(model.model.rotary_emb.inv_freq, LlamaForCausalLM(reference).model.rotary_emb.inv_freq)
