"""What a run computes with: the same figures for the same shape, whoever's code it is; its own description; its tokenizer."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, MixtralConfig, PreTrainedTokenizerFast

from longspan.cli import model_source
from longspan.cli.config import Train
from longspan.cli.model_source import DecoderSource
from longspan.cli.train import evaluate
from longspan.data.loader import Loader
from longspan.distributed.mesh import ParallelMesh
from longspan.hf.source import FolderSource
from longspan.models.decoder_config import DecoderConfig
from longspan.parallelize import parallelize
from tests.helpers.hf_models import build
from tests.helpers.ranks import Ranks, on_ranks

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
OURS = DecoderConfig(vocab=97, layers=2, hidden=32, heads=4, kv_heads=2, head_dim=8, ffn=48)


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_costs_what_our_decoder_of_its_shape_costs(tied: bool) -> None:
    ours = DecoderSource(DecoderConfig(**{**vars(OURS), "tied": tied}))
    theirs = FolderSource(LlamaConfig(**SHAPE, tie_word_embeddings=tied), None)
    assert theirs.flops_per_token(1000) == ours.flops_per_token(1000)
    assert (theirs.heads, theirs.vocab) == (ours.heads, ours.vocab)
    for source in (ours, theirs):
        assert source.summary.endswith(f"{ours.config.parameters:,} parameters")


def test_a_token_is_sent_to_some_experts_only() -> None:
    configs = [MixtralConfig(**SHAPE, num_local_experts=experts, num_experts_per_tok=2) for experts in (2, 4)]
    two, four = (FolderSource(config, None).flops_per_token(10) for config in configs)
    assert four - two == 6 * 2 * 2 * 32  # the router's rows for two more experts, in two layers


@pytest.mark.parametrize("source", [DecoderSource(OURS), FolderSource(LlamaConfig(**SHAPE, rope_theta=3e4), None)])
def test_a_source_is_made_again_from_its_description(source: Any) -> None:
    description = json.loads(json.dumps(source.described()))
    assert description == source.described()
    again = model_source.from_description(description)
    assert again.described() == description
    assert again.summary == source.summary
    first, second = source.build(3), again.build(3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def written(folder: str, out: str) -> None:
    mesh, source = ParallelMesh(), model_source.from_name(f"hf:{folder}")
    model = parallelize(source.build(0, 3), mesh, zero=3)
    assert source.export(model, Path(out), source.tokenizer, mesh)


def test_the_folder_s_tokenizer_is_the_default_and_goes_back_with_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    assert model_source.from_name(f"hf:{folder}").tokenizer == "bytes"
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?").save_pretrained(folder)
    transformers.GenerationConfig(max_new_tokens=7).save_pretrained(folder)
    assert model_source.from_name(f"hf:{folder}").tokenizer == str(folder)
    on_ranks(2, written, str(folder), str(tmp_path / "out"), tmp_path=tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == {"a": 0, "b": 1, "?": 2}
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 7


@dataclass(frozen=True)
class Ids:
    """A text of 64 tokens."""

    fingerprint: str = "ids"
    tokens: int = 64

    def read(self, start: int, stop: int) -> Tensor:
        return torch.randint(3, 97, (64,), generator=torch.Generator().manual_seed(5))[start:stop]


@pytest.mark.parametrize("degrees", [{"ulysses": 2}, {"data": 2}], ids=str)
def test_a_held_out_loss_is_the_cross_entropy_of_every_layout(degrees: dict[str, int], pool: Callable[[int], Ranks]) -> None:
    """The balance loss of experts is no part of it, nor are rows that fill a last micro-batch: 3 on 2 replicas."""
    (alone,) = pool(1).run(held_out_loss, {}, False)
    for found in pool(2).run(held_out_loss, degrees, True):
        assert found == pytest.approx(alone, rel=1e-6)


def held_out_loss(degrees: dict[str, int], asked: bool) -> float:
    mesh = ParallelMesh(**{axis: degree for axis, degree in degrees.items() if axis != "data"})
    model = parallelize(build("mixtral", output_router_logits=asked, router_aux_loss_coef=0.5), mesh)
    at, config = mesh.coordinate, Train(eval_rows=3, tokens=16, dtype="fp32")
    return evaluate(model, Loader(Ids(), tokens=16, rows=at.data, seed=0, coordinate=at), config, mesh)
