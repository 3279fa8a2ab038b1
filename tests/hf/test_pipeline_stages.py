"""Pipeline stages of Hugging Face models by their own plans: exact, or refused by name before anything is split."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from longspan import (
    LongspanError,
    MemoryOptions,
    ModelError,
    ParallelMesh,
    PipelineOptions,
    RunError,
    forward_backward,
    parallelize,
    shard_batch,
)
from longspan.batch.labels import IGNORE
from tests.helpers.hf_models import KINDS, batches, build, forward_alone, targets
from tests.helpers.ranks import Ranks

EXACT = ["llama", "qwen3", "gemma2", "mixtral", "gpt_oss"]
MORE = ["qwen3_moe", "gemma3", "deepseek_v3", "olmo2", "gpt_neox", "starcoder2", "mistral", "qwen2", "phi3, longrope"]
BATCHES = ["odd length", "packed", "right padding", "a rank without labels"]
BOTH = {"pipeline": 2, "ulysses": 2}
INTERLEAVED = PipelineOptions("interleaved", stages_per_rank=2)
LAYOUTS: list[tuple[dict[str, int], int, PipelineOptions]] = [
    (BOTH, 2, PipelineOptions("gpipe")), ({"pipeline": 2}, 0, INTERLEAVED), ({"pipeline": 2, "ring": 2}, 0, PipelineOptions()),
]  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_it_is_one_device(name: str, pool: Callable[[int], Ranks]) -> None:
    pool(4).run(equals_one_device, name, BOTH, 3, "packed", PipelineOptions(), MemoryOptions(recompute="full"), {})


def test_a_tied_head_and_padding_on_interleaved_stages(pool: Callable[[int], Ranks]) -> None:
    more = {"tie_word_embeddings": True}
    pool(2).run(equals_one_device, "llama", {"pipeline": 2}, 0, "left padding", INTERLEAVED, MemoryOptions(), more)


@pytest.mark.long
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", EXACT + MORE)
def test_it_is_one_device_for_every_batch(name: str, batch: str, pool: Callable[[int], Ranks]) -> None:
    """Beside Ulysses with every batch; each kind has two batches on the other layouts, where each batch is with some kinds."""
    turn = (EXACT + MORE).index(name) + BATCHES.index(batch)
    for degrees, zero, options in (LAYOUTS[0], LAYOUTS[1 + turn // 2 % 2])[: 1 + turn % 2]:
        more = {"tie_word_embeddings": True} if zero else {}
        pool(4).run(equals_one_device, name, degrees, zero, batch, options, MemoryOptions(chunked_loss=zero == 2), more)


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mixtral", "qwen3_moe"])
def test_beside_tensor_parallelism(name: str, pool: Callable[[int], Ranks]) -> None:
    pool(4).run(equals_one_device, name, {"pipeline": 2, "tensor": 2}, 0, "odd length", PipelineOptions(), MemoryOptions(), {})


def equals_one_device(
    name: str, degrees: dict[str, int], zero: int, batch: str, options: PipelineOptions, memory: MemoryOptions,
    config: dict[str, Any],
) -> None:  # fmt: skip
    """Loss and gradients of two micro-batches, the second with its rows in the other order."""
    mesh, more = ParallelMesh(**degrees), {"num_hidden_layers": 4, **config}
    reference, model = build(name, **more), build(name, **more)
    parallelize(model, mesh, zero=zero, memory=memory, pipeline=options)
    one = batches(batch, False)
    whole = [one, {key: value.flip(0) for key, value in one.items()}]
    counts = [int((targets(each["labels"], False) != IGNORE).sum()) for each in whole]
    losses = [forward_alone(reference, each, False)[0] * count / sum(counts) for each, count in zip(whole, counts, strict=True)]
    loss = torch.stack(losses).sum()
    loss.backward()
    got = forward_backward(model, shard_batch(whole, mesh))
    torch.testing.assert_close(got.double(), loss.detach().double(), rtol=1e-5, atol=1e-6)  # Transformers' loss is fp32
    named = dict(reference.named_parameters(remove_duplicate=False))
    total = torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None]).norm().item()
    exact = KINDS[name].dtype == torch.float64 and KINDS[name].tolerance < 1e-9
    for parameter_name, parameter in model.named_parameters():
        want = named[parameter_name].grad
        if want is None:
            continue
        assert parameter.grad is not None, parameter_name
        mine = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        error = (mine - want).norm().item()
        assert error <= (1e-10 if exact else 2e-5) * max(want.norm().item(), 1e-3 * total), f"{parameter_name}: {error:.1e}"


@pytest.mark.parametrize("without", ["all", "the last"])
def test_a_replica_without_rows_joins(without: str, pool: Callable[[int], Ranks]) -> None:
    pool(4).run(no_rows, without)


def no_rows(without: str) -> None:
    """Two micro-batches of two replicas; the second replica has no row in the last, or in both."""
    mesh, reference, ids = ParallelMesh(pipeline=2), build("llama"), batches("odd length", False)["input_ids"]
    model = parallelize(build("llama"), mesh)
    first = ids.flip(0) if without == "the last" else ids[:0]
    mine = [ids, ids.flip(1)] if mesh.coordinate.data_rank == 0 else [first, ids[:0]]
    whole = torch.cat([ids, ids.flip(1), first])
    forward_alone(reference, {"input_ids": whole, "labels": whole}, False)[0].backward()
    forward_backward(model, shard_batch([{"input_ids": each, "labels": each} for each in mine], mesh))
    named = dict(reference.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, named[name].grad, rtol=1e-5, atol=1e-7)


REFUSALS = [
    ("gpt2", {}, "GPT2LMHeadModel has no base_model_pp_plan"),
    ("mixtral", {"output_router_logits": True}, "balance loss of its experts"),
    ("llama", {"num_hidden_layers": 1}, "1 layers cannot be split into 2 pipeline stages"),
]


@pytest.mark.parametrize(("name", "config", "text"), REFUSALS)
def test_what_is_not_exact_is_refused(name: str, config: dict[str, Any], text: str, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(refused, name, config, text)


def refused(name: str, config: dict[str, Any], text: str) -> None:
    with pytest.raises(LongspanError, match=text):
        parallelize(build(name, **config), ParallelMesh(pipeline=2))


def test_what_one_stage_refuses_is_raised_on_every_stage(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(refused_alike)


def refused_alike() -> None:
    mesh = ParallelMesh(pipeline=2)
    model: Any = parallelize(build("llama", num_hidden_layers=2), mesh)
    (part,) = shard_batch([batches("odd length", False)], mesh)
    with pytest.raises(ModelError, match="output_attentions= means the whole sequence"):
        forward_backward(model, [part | {"output_attentions": True}])
    with pytest.raises(RunError, match=r"the layers of one pipeline stage; call longspan\.hf\.save"):
        model.save_pretrained("nowhere")
    if mesh.coordinate.pipeline_rank == 0:
        model.model.layers[0].mlp = nn.Identity()
    with pytest.raises(ModelError, match=r"module 'model.layers.0.mlp' was added or replaced after parallelize"):
        forward_backward(model, [part])


def test_layers_that_read_more_than_hidden_states_are_refused(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(reads_more)


class Adds(nn.Module):
    """Token-wise, but of the embedding that another stage has: what the base model hands to a later layer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._held: list[torch.Tensor] = []
        model.model.embed_tokens.register_forward_hook(lambda module, args, output: self._held.append(output))
        model.model.register_forward_hook(lambda *_: self._held.clear())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + (self._held[-1] if self._held else 0)


def reads_more() -> None:
    model = build("llama", num_hidden_layers=2)
    model.model.layers[1].mlp = Adds(model)
    with pytest.raises(ModelError, match="read more than the hidden states of the layer before"):
        parallelize(model, ParallelMesh(pipeline=2))
