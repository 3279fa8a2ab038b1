"""The cheapest tools that fit a budget: those that a model can be given, said on every rank alike."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from longspan import ModelError, ParallelMesh, parallelize
from longspan.memory.auto import cheapest, choose
from longspan.models.decoder import PRESETS, Decoder, DecoderConfig
from tests.helpers.ranks import Ranks

SMALL = DecoderConfig(vocab=512, layers=3, hidden=128, heads=4, kv_heads=2, head_dim=32, ffn=512)


def test_auto_takes_the_cheapest_that_fits_and_says_why() -> None:
    sizes = PRESETS["llama-8b"]
    ask = {"parameters": sizes.parameters, "tokens": 131_072, "ranks": 8, "itemsize": 2}
    roomy, tight = (cheapest(sizes, budget=gib * 2**30, **ask) for gib in (10_000, 80))
    assert roomy.tools == {}
    assert tight.needs.peak <= 80 * 2**30
    assert tight.tools
    assert "fits into 80.00" in tight.why
    impossible = cheapest(sizes, budget=2**30, **ask)
    assert "is the nearest to 1.00" in impossible.why
    assert cheapest(sizes, budget=80 * 2**30, whole_logits=True, **ask).tools["return_logits"] is False
    least = [cheapest(sizes, budget=1, whole_logits=whole, **ask).needs.phases["loss"] for whole in (False, True)]
    assert least[1] > least[0]  # the model's own head forms tiles, with their log-softmax and gradient


def test_auto_gives_a_model_its_tools(caplog: pytest.LogCaptureFixture) -> None:
    model = parallelize(Decoder(SMALL), ParallelMesh(), memory="auto", memory_budget_gib=0.1, tokens=20_000)
    assert "forward" in vars(model.blocks[0])
    assert "selective" in caplog.text
    with pytest.raises(ModelError, match=r"needs memory_budget_gib= .* and tokens="):
        parallelize(Decoder(SMALL), ParallelMesh(), memory="auto")


def test_what_wants_shares_is_given_them() -> None:
    ask = {"parameters": SMALL.parameters, "tokens": 1_000, "ranks": 4, "budget": 2**40}
    assert cheapest(SMALL, **ask).tools == {}
    assert cheapest(SMALL, sharded=True, **ask).tools == {"zero": 2}
    whole, shared = (cheapest(SMALL, sharded=True, shares=shares, **ask).needs.states for shares in (1, None))
    assert whole == 4 * shared
    model = parallelize(
        Decoder(SMALL), ParallelMesh(), memory="auto", memory_budget_gib=50.0, tokens=1_000, dtype=torch.bfloat16
    )
    assert isinstance(model, FSDPModule)


def test_head_chunks_are_chosen_only_where_heads_divide() -> None:
    odd = DecoderConfig(vocab=512, layers=3, hidden=128, heads=9, kv_heads=3, head_dim=32, ffn=512)
    model = parallelize(Decoder(odd), ParallelMesh(), memory="auto", memory_budget_gib=0.001, tokens=20_000)
    assert len(model.blocks[0].chunks) == 1
    six = replace(odd, heads=6, kv_heads=2)
    asked = {"parameters": six.parameters, "tokens": 20_000, "budget": 1}  # nothing fits: every set is tried
    assert cheapest(six, ranks=2, **asked).tools["head_chunks"] == 2
    assert "head_chunks" not in cheapest(six, ranks=4, **asked).tools  # three heads of a chunk are none for one of four ranks


def test_the_sizes_of_a_hugging_face_model_are_read_from_its_config() -> None:
    config = LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(config)
    ask = {"tokens": 50_000, "ranks": 2, "itemsize": 4}
    assert choose(model, budget_gib=0.1, **ask).tools["return_logits"] is False
    assert choose(model, budget_gib=99.0, **ask).tools == {}
    other = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=64, n_layer=1, n_head=4))
    with pytest.raises(ModelError, match="finds no intermediate_size in the config of GPT2LMHeadModel; name the tools"):
        choose(other, budget_gib=99.0, **ask)


def test_what_one_rank_asks_alone_is_refused_by_all(pool: Callable[[int], Ranks]) -> None:
    one, other = pool(2).run(asked_differently)
    assert one == other
    assert 'memory="auto" is' in one


def asked_differently() -> str:
    mesh = ParallelMesh(ulysses=2)
    budget = 99.0 if mesh.coordinate.ulysses_rank else 0.01
    with pytest.raises(ModelError) as error:
        parallelize(Decoder(SMALL), mesh, memory="auto", memory_budget_gib=budget, tokens=20_000)
    return str(error.value)
