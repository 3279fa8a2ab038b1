"""The code of a model behind its base model, as a function of hidden states."""

import torch

from longspan.hf.behind_base import catching, logits_of, parameters_beside_base
from tests.helpers.hf_models import build


def test_logits_of_hidden_states_are_those_of_the_model() -> None:
    model, ids = build("gemma2").eval(), torch.arange(1, 9).unsqueeze(0)
    with catching(model.base_model) as caught:
        expected = model(input_ids=ids, use_cache=False).logits
    (output,) = caught
    assert torch.equal(logits_of(model, type(output), output.last_hidden_state), expected)
    assert "forward" not in vars(model.base_model)


def test_parameters_beside_the_base_model_are_named_as_in_the_model() -> None:
    model = build("llama", tie_word_embeddings=True)
    (found,) = parameters_beside_base(model).items()
    assert found == ("model.lm_head.weight", model.model.embed_tokens.weight)
