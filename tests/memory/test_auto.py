"""The fastest options that fit a budget: those that a model can be given, the same on every rank."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from longspan import AutoMemory, MemoryOptions, ModelError, ParallelMesh, parallel_state, parallelize
from longspan.memory.auto import choose, fastest_that_fits
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import PRESETS, DecoderConfig
from tests.helpers.ranks import Ranks

SMALL = DecoderConfig(vocab=512, layers=3, hidden=128, heads=4, kv_heads=2, head_dim=32, ffn=512)


def test_auto_takes_the_cheapest_that_fits_and_says_why() -> None:
    sizes = PRESETS["llama-8b"]
    ask = {"parameters": sizes.parameters, "tokens": 131_072, "ranks": 8, "itemsize": 2}
    roomy, tight = (fastest_that_fits(sizes, budget=gib * 2**30, **ask) for gib in (10_000, 80))
    assert (roomy.zero, roomy.memory) == (0, MemoryOptions())
    assert tight.needs.peak <= 80 * 2**30
    assert tight.memory != MemoryOptions()
    assert fastest_that_fits(sizes, budget=80 * 2**30, whole_logits=True, **ask).memory.chunked_loss
    ask |= {"budget": 1, "whole_logits": True}
    least = [fastest_that_fits(sizes, linear_head=linear, **ask).needs.phases["loss"] for linear in (True, False)]
    others = fastest_that_fits(sizes, linear_head=False, **ask | {"whole_logits": False})
    assert others.needs.phases["loss"] == least[0]  # a model that forms no loss
    assert least[1] > least[0]  # the model's own code forms tiles, with their log-softmax and gradient


def test_auto_gives_a_model_its_tools(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "longspan")
    model = parallelize(Decoder(SMALL), ParallelMesh(), memory=AutoMemory(budget_gib=0.25, tokens=20_000))
    assert "forward" in vars(model.blocks[0])
    state = parallel_state(model)
    assert state is not None
    assert state.memory.recompute == "selective"
    assert "GiB a rank for 20,000 tokens fit into 0.25" in caplog.text


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (
            {"budget_gib": 0.01, "tokens": 20_000},
            r"cannot be kept: .* is 0\.\d\d GiB a rank, with zero=3, .*; use a larger budget",
        ),
        ({"budget_gib": 2.0, "tokens": 99, "zero": 3}, "chooses zero, which was given as 3"),
        ({"budget_gib": -1.0, "tokens": 99}, "more than 0"),
        ({"budget_gib": 2.0, "tokens": 0}, "at least 1"),
    ],
    ids=["nothing fits", "zero beside it", "no budget", "no tokens"],
)
def test_a_budget_that_cannot_be_kept_is_refused(asked: dict[str, Any], text: str) -> None:
    model = Decoder(SMALL)
    with pytest.raises(ModelError, match=text):
        parallelize(model, ParallelMesh(), zero=asked.pop("zero", 0), memory=AutoMemory(**asked))
    assert parallel_state(model) is None


def test_what_wants_shares_is_given_them() -> None:
    ask = {"parameters": SMALL.parameters, "tokens": 1_000, "ranks": 4, "budget": 2**40}
    assert fastest_that_fits(SMALL, **ask)[:2] == (0, MemoryOptions())
    assert fastest_that_fits(SMALL, sharded=True, **ask)[:2] == (2, MemoryOptions())
    whole, shared = (fastest_that_fits(SMALL, sharded=True, fsdp_ranks=shares, **ask).needs.states for shares in (1, None))
    assert whole == 4 * shared
    model = parallelize(Decoder(SMALL), ParallelMesh(), memory=AutoMemory(50.0, 1_000), dtype=torch.bfloat16)
    assert isinstance(model, FSDPModule)


def test_head_chunks_are_chosen_only_where_heads_divide() -> None:
    odd = DecoderConfig(vocab=512, layers=3, hidden=128, heads=9, kv_heads=3, head_dim=32, ffn=512)
    ask = {"parameters": odd.parameters, "tokens": 20_000, "budget": 1}  # nothing fits: every set is tried
    assert fastest_that_fits(odd, ranks=1, **ask).memory.head_chunks == 1
    six = replace(odd, heads=6, kv_heads=2)
    asked = {"parameters": six.parameters, "tokens": 20_000, "budget": 1}  # nothing fits: every set is tried
    assert fastest_that_fits(six, ranks=2, **asked).memory.head_chunks == 2
    assert fastest_that_fits(six, ranks=4, **asked).memory.head_chunks == 1  # 3 heads a chunk, 4 ranks


def test_the_sizes_of_a_hugging_face_model_are_read_from_its_config() -> None:
    config = LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(config)
    ask = {"ranks": 2, "itemsize": 4}
    assert choose(model, AutoMemory(0.2, 50_000), **ask)[0].memory.chunked_loss
    assert choose(model, AutoMemory(99.0, 50_000), **ask)[0][:2] == (0, MemoryOptions())
    other = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=64, n_layer=1, n_head=4))
    with pytest.raises(ModelError, match="finds no intermediate_size in the config of GPT2LMHeadModel; pass MemoryOptions"):
        choose(other, AutoMemory(99.0, 50_000), **ask)


def test_what_one_rank_asks_alone_is_refused_by_all(pool: Callable[[int], Ranks]) -> None:
    one, other = pool(2).run(asked_differently)
    assert one == other
    assert "memory is" in one


def asked_differently() -> str:
    mesh = ParallelMesh(ulysses=2)
    budget = 99.0 if mesh.coordinate.ulysses_rank else 0.2
    with pytest.raises(ModelError) as error:
        parallelize(Decoder(SMALL), mesh, memory=AutoMemory(budget, 20_000))
    return str(error.value)
