"""Positions of a rank's tokens: one row of them for all rows, and three rows of text, height and width."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

from longspan import parallelize, shard_batch, unshard
from longspan.distributed.collectives import all_reduce_sum
from tests.helpers.hf_models import BASE, assert_gradients, batches, build, forward_alone, forward_cut
from tests.helpers.ranks import Ranks, mesh_of


def test_one_row_of_positions_packs_every_row(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(one_row_of_positions)


def one_row_of_positions() -> None:
    reference, mesh = build("llama"), mesh_of(2, 1)
    model = parallelize(deepcopy(reference), mesh)
    whole = batches("packed", False)
    whole["position_ids"] = whole["position_ids"][:1]
    expected, _ = forward_alone(reference, whole, False)
    found, _ = forward_cut(model, whole, False, mesh, True)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)


def test_three_rows_of_positions_are_one_device(pool: Callable[[int], Ranks]) -> None:
    """[3, batch, tokens], as qwen2_vl has them; on a ring, in zigzag, and with a replica that has no row."""
    pool(2).run(three_rows, 1, 2, False)
    pool(2).run(three_rows, 1, 1, True)


def three_rows(ulysses: int, ring: int, replicas: bool) -> None:
    mesh, reference = mesh_of(ulysses, ring), vision_text()
    model = parallelize(deepcopy(reference), mesh)
    drawn = torch.Generator().manual_seed(3)
    ids, positions = torch.randint(3, 97, (2, 13), generator=drawn), torch.randint(0, 13, (3, 2, 13), generator=drawn)
    weights = torch.randn(2, 13, 32, generator=drawn, dtype=torch.float64)
    out = reference(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    (out * weights).sum().backward()
    rows = slice(0, 2) if not replicas or mesh.coordinate.data_rank == 0 else slice(0, 0)
    part = shard_batch({"input_ids": ids[rows], "position_ids": positions[:, rows]}, mesh)
    mine = unshard(model(**part).last_hidden_state, mesh, tokens=13)
    torch.testing.assert_close(mine, out[rows], rtol=1e-10, atol=1e-10)
    (all_reduce_sum((mine * weights[rows]).sum(), mesh.loss_group) / (1 if replicas else mesh.world_group.size())).backward()
    assert_gradients(model, reference, 1e-10)


def vision_text() -> Any:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = Qwen2VLTextConfig(**{**BASE, "rope_parameters": rope})
    return Qwen2VLTextModel(config).double().train()
