"""Models that their config already rules out."""

from collections.abc import Callable
from typing import Any

import pytest

from longspan import MemoryOptions, ModelError, ParallelMesh, parallelize
from longspan.hf.candidate import Candidate
from longspan.hf.config_refusals import probe
from tests.helpers.encoder_decoders import TINY_T5, build_pair, refused_pair
from tests.helpers.hf_models import build, small
from tests.helpers.ranks import Ranks


def test_layers_that_are_dropped_at_random_are_refused(pool: Callable[[int], Ranks]) -> None:
    (message,) = pool(1).run(refused_pair, build_pair("bart", decoder_layerdrop=0.1))
    assert "config.decoder_layerdrop drops layers at random, other ones on every rank; set it to 0" in message


def refusal_of(model: Any) -> str:
    with pytest.raises(ModelError) as error:
        probe(Candidate(model, model, ParallelMesh(), MemoryOptions(), "auto", ()))
    return str(error.value)


def test_the_field_that_rules_a_model_out_is_named() -> None:
    model = build("llama")
    assert probe(Candidate(model, model, ParallelMesh(), MemoryOptions(), "auto", ())) is None
    model.config.index_topk = 512
    assert refusal_of(model).startswith("config.index_topk says that LlamaForCausalLM selects or compresses keys")
    del model.config.index_topk
    model.config.encoder_layerdrop = 0.2
    assert refusal_of(model) == "config.encoder_layerdrop drops layers at random, other ones on every rank; set it to 0"


def test_attention_probabilities_are_refused_as_outputs() -> None:
    model = build("llama", attn_implementation="eager", output_attentions=True)
    with pytest.raises(ModelError, match=r"config.output_attentions asks for the probabilities of all tokens"):
        parallelize(model, ParallelMesh())


def test_a_model_without_weights_cannot_be_proven() -> None:
    assert refusal_of(build("llama").to("meta")).startswith("LlamaForCausalLM is on the meta device; give it weights")


def test_experts_with_a_capacity_are_refused() -> None:
    settings = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 2}
    model = small("SwitchTransformersConfig", "SwitchTransformersForConditionalGeneration", **TINY_T5, **settings)()
    text = refusal_of(model)
    assert text.startswith("config.expert_capacity lets each expert of Switch")
    assert "drops the rest" in text
