"""Guarantee 1 for encoder-decoders of Transformers: two rows of tokens, each cut by its own length, against one device.

The reference is the untouched model, its own attention and its own loss. All in fp64, but those whose own attention or norms
compute in fp32: T5Gemma and the T5 family.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from longspan import ParallelMesh, parallelize, shard_batch, unparallelize, unshard
from longspan.batch.labels import IGNORE
from tests.helpers.encoder_decoders import PAIR_BATCHES, PAIR_KINDS, build_pair, pair_alone, pair_batches, tolerance_of
from tests.helpers.hf_models import assert_gradients
from tests.helpers.options import keywords
from tests.helpers.ranks import Ranks, mesh_of

transformers.logging.set_verbosity_error()

LAYOUTS = [(2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]


def compare(name: str, batch: str, ulysses: int, ring: int, zero: int = 0, steps: int = 0, **tools: Any) -> None:
    mesh = mesh_of(ulysses, ring)
    reference = build_pair(name)
    model, whole, tolerance = deepcopy(reference), pair_batches(name, batch), tolerance_of(name)
    parallelize(model, mesh, **keywords({"zero": zero} | tools))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (reference, model)]
    for step in range(1 + steps):
        expected = pair_alone(reference, whole)
        expected.loss.backward()
        part = shard_batch(whole, mesh, shift=False)
        found = model(**part)
        found.loss.backward()
        loose = tolerance if step == 0 else max(tolerance, 1e-6)  # a true gradient of 0 has the sign of rounding
        assert abs(found.loss.item() - expected.loss.item()) <= loose * expected.loss.item(), f"loss of step {step}"
        if step == 0:
            assert_outputs(found, expected, whole, part["longspan"], mesh, tolerance)
            assert_gradients(model, reference, tolerance)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if zero == 0:
        unparallelize(model)
        assert not [key for key in vars(model) if "longspan" in key or key in ("_loss_function", "forward")]
        assert not [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks]
        assert torch.isfinite(pair_alone(model, whole).loss)


def assert_outputs(
    found: Any, expected: Any, whole: dict[str, Tensor], step: Any, mesh: ParallelMesh, tolerance: float
) -> None:
    for output, row, mask in (
        ("logits", step.target, "decoder_attention_mask"), ("encoder_last_hidden_state", step, "attention_mask")
    ):  # fmt: skip
        mine, theirs = unshard(found[output], mesh, tokens=row.tokens), expected[output]
        real = whole.get(mask, torch.ones(theirs.shape[:2])).bool()
        assert (mine - theirs)[real].abs().max() <= tolerance * theirs[real].abs().max(), output


PAIRS = [(name, batch) for name in PAIR_KINDS for batch in PAIR_BATCHES if batch != "packed targets" or name == "t5gemma"]

SOME = [
    *[("t5gemma", batch) for batch in PAIR_BATCHES],
    *[("bart", batch) for batch in ("even", "few targets", "right padding", "left padding")],
    *[("t5", batch) for batch in ("odd lengths", "a rank without labels", "right padding")],
    ("mbart", "odd lengths"), ("pegasus", "right padding"), ("marian", "odd lengths"), ("plbart", "right padding"),
    ("mt5", "even"), ("umt5", "right padding"),
]  # fmt: skip
"""Every batch with one model, some with one more of each way to count positions, one with each of their kin.

A batch's fault shows with any model of its way to count positions, a model's own fault with any batch; test-long has all pairs.
"""


@pytest.mark.parametrize(("name", "batch"), SOME)
def test_pairs_under_one_layout(name: str, batch: str, pool: Callable[[int], Ranks]) -> None:
    """Ulysses 2 for the even batch, with three steps of AdamW; for the others the layouts in turn."""
    turn = [(2, 1), (1, 2), (2, 2), (1, 2), (2, 1), (1, 4), (4, 1)]
    ulysses, ring = LAYOUTS[0] if batch == "even" else turn[SOME.index((name, batch)) % len(turn)]
    pool(ulysses * ring).run(compare, name, batch, ulysses, ring, 0, 3 if batch == "even" else 0)


@pytest.mark.long
@pytest.mark.parametrize(("name", "batch"), PAIRS)
def test_every_pair_under_one_layout(name: str, batch: str, pool: Callable[[int], Ranks]) -> None:
    """Each kind has every layout with some batch, and each batch every layout with some kind."""
    ulysses, ring = LAYOUTS[(list(PAIR_KINDS).index(name) + PAIR_BATCHES.index(batch)) % len(LAYOUTS)]
    pool(ulysses * ring).run(compare, name, batch, ulysses, ring, 0, 3)


LONG = pytest.mark.long  # t5gemma has windows and a softcap, t5 a bias; what bart adds to them are learned positions


@pytest.mark.parametrize("name", [pytest.param("bart", marks=LONG), "t5gemma", "t5"])
def test_sharded_parameters_and_every_tool(name: str, pool: Callable[[int], Ranks]) -> None:
    tools = {"recompute": "full", "tile_tokens": 4, "head_chunks": 2, "offload_activations": True}
    pool(2).run(compare_with, name, "right padding", tools)


def compare_with(name: str, batch: str, tools: dict[str, Any]) -> None:
    compare(name, batch, 2, 1, 3, 1, **tools)


@pytest.mark.parametrize("name", ["bart", pytest.param("t5", marks=LONG)])
def test_replicas_count_labels_together_and_one_without_a_row_joins(name: str, pool: Callable[[int], Ranks]) -> None:
    pool(4).run(replicas, name)


def replicas(name: str) -> None:
    """Two micro-batches, the second of one row: none is left for the second replica."""
    mesh, reference = mesh_of(2), build_pair(name)
    model = parallelize(deepcopy(reference), mesh)
    whole, tolerance = pair_batches(name, "right padding"), tolerance_of(name)
    first = {key: value[[mesh.coordinate.data_rank]] for key, value in whole.items()}
    second = {key: value[:1] if mesh.coordinate.data_rank == 0 else value[:0] for key, value in whole.items()}
    num_labels = int((whole["labels"] != IGNORE).sum()) + int((whole["labels"][:1] != IGNORE).sum())
    expected = torch.zeros(())
    for batch in (whole, {key: value[:1] for key, value in whole.items()}):
        loss = pair_alone(reference, batch).loss * int((batch["labels"] != IGNORE).sum()) / num_labels
        loss.backward()
        expected = expected + loss.detach()
    found = torch.zeros(())
    for part in shard_batch([first, second], mesh, shift=False):
        loss = model(**part).loss
        loss.backward()
        found = found + loss.detach()
    assert abs(found - expected) <= tolerance * expected
    assert_gradients(model, reference, tolerance)
