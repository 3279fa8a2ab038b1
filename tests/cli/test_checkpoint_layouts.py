"""A checkpoint is free of the layout on all five axes: saved on one and loaded on another, the next losses are the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from longspan import ParallelMesh, clip_grad_norm_, forward_backward, parallelize, shard_batch
from longspan.cli import checkpoint
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import DecoderConfig
from tests.helpers.ranks import Ranks

SHAPE = {"vocab": 97, "layers": 4, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 24}
LAYOUTS: dict[str, tuple[dict[str, int], int]] = {
    "tensor x ulysses": ({"tensor": 2, "ulysses": 2}, 3), "pipeline x data": ({"pipeline": 2}, 0), "one rank": ({}, 0),
    "pipeline x tensor": ({"pipeline": 2, "tensor": 2}, 2),
}  # fmt: skip
ROWS, TOKENS = 4, 23


QUICK = ("tensor x ulysses", "pipeline x data")


@pytest.mark.parametrize(
    ("tied", "names"),
    [(True, QUICK), *(pytest.param(tied, tuple(LAYOUTS), marks=pytest.mark.long) for tied in (True, False))],
)
def test_the_next_losses_are_the_same_on_every_pair_of_layouts(
    tied: bool, names: tuple[str, ...], tmp_path: Path, pool: Callable[[int], Ranks]
) -> None:
    for differences in pool(4).run(every_pair, str(tmp_path), tied, names):
        assert len(differences) == len(names) ** 2
        assert max(differences.values()) <= 1e-10, differences


def every_pair(folder: str, tied: bool, names: tuple[str, ...]) -> dict[tuple[str, str], float]:
    """{(saved on, loaded on): the largest difference of the next two losses}."""
    found = {}
    for saving in names:
        mesh, model, optimizer = made(saving, 0, tied)
        for number in (1, 2):
            step(mesh, model, optimizer, number)
        run = Path(folder, saving)
        checkpoint.save(run, 2, model, optimizer, {}, mesh, 2)
        wanted = [step(mesh, model, optimizer, number) for number in (3, 4)]
        for loading in names:
            mesh_2, model_2, optimizer_2 = made(loading, 7, tied)
            step(mesh_2, model_2, optimizer_2, 1)  # states to be overwritten
            path = checkpoint.newest(run)
            assert path is not None
            checkpoint.load(path, model_2, optimizer_2)
            got = [step(mesh_2, model_2, optimizer_2, number) for number in (3, 4)]
            found[saving, loading] = max(abs(x - y) for x, y in zip(wanted, got, strict=True))
    return found


def made(name: str, seed: int, tied: bool) -> tuple[ParallelMesh, nn.Module, torch.optim.Optimizer]:
    degrees, zero = LAYOUTS[name]
    mesh = ParallelMesh(**degrees)
    model = parallelize(Decoder(DecoderConfig(**SHAPE, tied=tied), seed=seed).double(), mesh, zero=zero)
    return mesh, model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def step(mesh: ParallelMesh, model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
    """One step on the global batch ``number``; returns its loss."""
    ids = torch.randint(0, SHAPE["vocab"], (ROWS, TOKENS), generator=torch.Generator().manual_seed(number))
    mine = ids.tensor_split(mesh.coordinate.data)[mesh.coordinate.data_rank]
    loss = forward_backward(model, shard_batch([{"input_ids": mine, "labels": mine}], mesh))
    clip_grad_norm_(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
