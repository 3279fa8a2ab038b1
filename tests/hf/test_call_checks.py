"""Calls that mean the whole sequence are refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan import ModelError, ParallelMesh, parallelize, shard_batch
from longspan.hf import save
from tests.helpers.encoder_decoders import build_pair
from tests.helpers.hf_models import BASE, build, small
from tests.helpers.ranks import Ranks, mesh_of


def test_calls_that_mean_the_whole_sequence_are_refused() -> None:
    mesh = ParallelMesh()
    model = parallelize(build("llama"), mesh)
    part = shard_batch({"input_ids": torch.ones(1, 8, dtype=torch.long)}, mesh)
    for call, text in [
        (lambda: model(input_ids=part["input_ids"]), r"call model\(\*\*shard_batch\(batch, mesh\)\)"),
        (lambda: model(input_ids=part["input_ids"], longspan=part["longspan"]), "position_ids of the part is missing"),
        (lambda: model(**part | {"input_ids": torch.ones(1, 9).long()}), r"\[1, 9\] is not this rank's part .* \[1, 8\]"),
        (lambda: model.generate(part["input_ids"], max_new_tokens=1), r"A parallel model does not generate: call longspan\.hf"),
        (lambda: model(**part, use_cache=True), "use_cache= means the whole sequence"),
        (lambda: model(**part, logits_to_keep=1), "logits_to_keep= means the whole sequence"),
        (lambda: model(**part, output_attentions=True), "output_attentions= means the whole sequence"),
        (lambda: model(**part, is_causal=False), "is_causal= would reach the attention of LlamaForCausalLM, whose layers"),
        (lambda: model(**part, sliding_window=3), "sliding_window= would reach the attention"),
        (lambda: model(**part, s_aux=torch.ones(4)), "s_aux= would reach the attention"),
        (lambda: model(**part, dropout=0.5), "dropout= would reach the attention"),
        (lambda: model(**part, labels=torch.ones(1, 9).long()), r"labels of shape \[1, 9\] is not this rank's part"),
        (lambda: model(**part, token_type_ids=torch.ones(1, 9).long()), r"token_type_ids of shape \[1, 9\] is not this"),
        (lambda: model(**part, inputs_embeds=torch.ones(1, 8, 32)), "input_ids and inputs_embeds are both given"),
        (lambda: model(**part, pixel_values=torch.zeros(1, 3, 8, 8)), "pixel_values= is no tensor of tokens: each rank would"),
    ]:
        with pytest.raises(ModelError, match=text):
            call()


def test_tokens_of_an_image_that_see_one_another_are_refused() -> None:
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    parts = {
        "text_config": {**BASE, "head_dim": 8, "sliding_window": 5},
        "vision_config": {**layers, "image_size": 8, "patch_size": 4},
    }
    tokens = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92, "mm_tokens_per_image": 4}
    model = small("Gemma3Config", "Gemma3ForConditionalGeneration", **parts, **tokens)()
    ids = torch.arange(3, 15).unsqueeze(0)
    parallelize(model, mesh := ParallelMesh())
    model(**shard_batch({"input_ids": ids}, mesh))
    with pytest.raises(ModelError, match="token_type_ids= lets the tokens of an image see one another in Gemma3"):
        model(**shard_batch({"input_ids": ids, "token_type_ids": (ids > 8).long()}, mesh))


def test_keys_of_another_model_are_refused() -> None:
    settings = {"vocab_size": 97, "d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    model = parallelize(small("BartConfig", "BartForCausalLM", **settings, dropout=0.0)(), mesh := ParallelMesh())
    part = shard_batch({"input_ids": torch.arange(3, 15).unsqueeze(0)}, mesh)
    model(**part)
    with pytest.raises(ModelError, match="encoder_hidden_states= means the whole sequence"):
        model(**part, encoder_hidden_states=torch.zeros(1, 4, 32))


def built(name: str) -> Any:
    return (build("llama") if name == "llama" else build_pair(name)).eval()


def generated(model: Any) -> list[list[int]]:
    ids = torch.arange(3, 19).reshape(2, 8)
    rows: list[list[int]] = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=1).tolist()
    return rows


def refused_and_saved(name: str, degrees: dict[str, int], zero: int, folder: Path) -> tuple[str, Any, Any]:
    """What ``generate`` of a parallel model raises, and what those of one device and of the saved model give."""
    reference, model = built(name), parallelize(built(name), mesh := mesh_of(**degrees), zero=zero)
    with pytest.raises(ModelError) as found:
        generated(model)
    save(model, folder, mesh)
    loaded = type(reference).from_pretrained(folder, dtype=reference.dtype)
    return str(found.value), generated(reference), generated(loaded)


@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize(("name", "degrees"), [("llama", {}), ("t5", {}), ("t5", {"ulysses": 2}), ("bart", {"ring": 2})])
def test_to_generate_is_refused_and_what_is_saved_generates(
    name: str, degrees: dict[str, int], zero: int, pool: Callable[[int], Ranks], tmp_path: Path
) -> None:
    for message, alone, saved in pool(2).run(refused_and_saved, name, degrees, zero, tmp_path / "model"):
        assert re.match(r"the batch was not cut by shard_batch, .* call longspan\.hf\.save\(model, folder, mesh\) on", message)
        assert saved == alone
