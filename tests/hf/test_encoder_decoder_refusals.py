"""Calls and batches of encoder-decoders that are refused, the same on every rank."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from longspan import AutoMemory, BatchError, LongspanError, parallelize, shard_batch, shift_right
from longspan.batch.labels import IGNORE
from tests.helpers.encoder_decoders import build_pair, pair_batches
from tests.helpers.ranks import Ranks, mesh_of

CALLS = {
    "no decoder_input_ids": r"had no decoder_input_ids; make them before the cut, by model.prepare_decoder",
    "decoder_input_ids for a decoder": r"LlamaForCausalLM has no decoder apart; leave them out",
    "no mask for a model that hides padding": r"hides the padding token .* attention_mask and decoder_attention_mask",
    "more positions than the table": r"the step has positions up to 64, and the table of Bart\w+ has 64 of them",
    "more positions than gpt2's table": r"positions up to 16, and the table of GPT2LMHeadModel has 16 of them",
    "encoder_outputs": r"encoder_outputs= means the whole sequence",
    "what a layer would add": r"BartAttention hands its attention score_bias, a tensor counted over",
    "a token that only the encoder knows": r"holds token or label 80, and T5GemmaForConditionalGeneration knows 0 to 59",
    "positions that one device ignores": r"counts its positions itself and ignores decoder_position_ids; give shard_batch none",
    "a kernel of the registry": r"kernel='hf:sdpa' attends within one row of tokens",
    "AutoMemory": r"AutoMemory knows models of one row of tokens, and BartForConditionalGeneration has two",
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_that_are_refused_on_every_rank(call: str, pool: Callable[[int], Ranks]) -> None:
    for message in pool(2).run(refused_call, call):
        assert re.search(CALLS[call], message), message


def refused_call(call: str) -> str:
    mesh = mesh_of(2)
    name = "t5gemma" if "hides" in call or "only the encoder" in call else "bart"
    whole, model, shift = pair_batches(name, "even"), build_pair(name), False
    if "gpt2" in call or "for a decoder" in call:
        ids = torch.zeros(1, 17, dtype=torch.long)
        whole = {"input_ids": ids} | ({"decoder_input_ids": ids} if "for a decoder" in call else {})
        tiny: Any = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 97}
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 97}
        model = (
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
            if "for a decoder" in call
            else transformers.GPT2LMHeadModel(transformers.GPT2Config(**tiny))
        )
    if "no decoder" in call:
        whole = {"input_ids": whole["input_ids"], "labels": whole["input_ids"]}
    if "hides" in call:
        whole = {name: value for name, value in whole.items() if name != "decoder_attention_mask"}
    if call == "more positions than the table":
        whole["input_ids"] = torch.full((2, 65), 5)
    if "only the encoder" in call:
        model.model.decoder.embed_tokens = torch.nn.Embedding(60, 32)
        whole["decoder_input_ids"].clamp_(max=50)
        whole["labels"].clamp_(max=50)
        whole["input_ids"][0, 0], whole["decoder_input_ids"][1, -1] = 90, 80
    if "ignores" in call:
        whole["decoder_position_ids"] = torch.arange(16).expand(2, 16)
    given = {"a kernel of the registry": {"kernel": "hf:sdpa"}, "AutoMemory": AUTO}.get(call, {})
    beside = {"encoder_outputs": (torch.zeros(1),), "what a layer would add": torch.zeros(1, 4)}
    more = {"score_bias" if "add" in call else call: beside[call]} if call in beside else {}
    try:
        parallelize(model, mesh, **given)
        model(**shard_batch(whole, mesh, shift=shift), **more)
    except LongspanError as error:
        return str(error)
    return "nothing was refused"


AUTO = {"memory": AutoMemory(budget_gib=1.0, tokens=1024)}


@pytest.mark.parametrize("name", ["bart", "marian", "pegasus", "t5", "umt5"])
def test_labels_are_shifted_as_the_models_shift_them(name: str) -> None:
    labels = torch.tensor([[7, 8, 9, IGNORE], [4, 5, IGNORE, IGNORE]])
    model = build_pair(name)
    ours = shift_right(labels, model.config.decoder_start_token_id, model.config.pad_token_id)
    assert torch.equal(ours, model.prepare_decoder_input_ids_from_labels(labels))
    with pytest.raises(BatchError, match=r"start=None and padding=1, and needs both; .*prepare_decoder_input_ids_from_labels"):
        shift_right(labels, None, 1)


KINDS_OF_REPLICAS = {
    "no decoder_input_ids": ("bart", "some have none; pass them on every rank"),
    "no masks": ("t5gemma", "hides the padding token by itself"),
    "positions": ("bart", "counts its positions itself and ignores decoder_position_ids"),
    "a longer row": ("bart", "the step has positions up to 64, and the table of"),
    "a longer target": ("bart", "the step has decoder_positions up to 64, and the table of"),
}


@pytest.mark.parametrize("kind", KINDS_OF_REPLICAS)
def test_what_one_replica_alone_has_is_refused_on_every_rank(kind: str, pool: Callable[[int], Ranks]) -> None:
    name, text = KINDS_OF_REPLICAS[kind]
    for message in pool(2).run(replicas_of_unequal_kind, kind, name):
        assert text in message


def replicas_of_unequal_kind(kind: str, name: str) -> str:
    mesh, model = mesh_of(), build_pair(name)
    parallelize(model, mesh)
    whole = pair_batches(name, "even")
    long = torch.full((2, 65), 5)
    others: dict[str, dict[str, Tensor]] = {
        "no decoder_input_ids": {"input_ids": whole["input_ids"][:0]},
        "no masks": {key: value for key, value in whole.items() if "mask" not in key},
        "positions": whole | {"decoder_position_ids": torch.arange(16).expand(2, 16)},
        "a longer row": whole | {"input_ids": long},
        "a longer target": whole | {"decoder_input_ids": long, "labels": long},
    }
    whole = others[kind] if mesh.coordinate.data_rank == 1 else whole
    try:
        model(**shard_batch(whole, mesh, shift=False))
    except LongspanError as error:
        return str(error)
    return "nothing was refused"
