"""``save_pretrained`` of a parallel model: the files of one device, or one sentence on every rank that calls it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from longspan import RunError, parallelize, unparallelize
from tests.helpers.hf_models import build
from tests.helpers.ranks import Ranks, mesh_of


def test_whole_parameters_are_saved_and_sharded_ones_are_refused(pool: Callable[[int], Ranks], tmp_path: Path) -> None:
    pool(2).run(saves, tmp_path)


def saves(folder: Path) -> None:
    mesh, reference = mesh_of(2, 1), build("llama").state_dict()
    rank = mesh.coordinate.ulysses_rank
    model = parallelize(build("llama"), mesh)
    if rank == 0:
        model.save_pretrained(folder / "whole")
    unparallelize(model)
    assert "save_pretrained" not in vars(model)

    sharded = parallelize(build("llama"), mesh, zero=3)
    with pytest.raises(RunError, match=r"shards of one rank.*call longspan\.hf\.save\(model, folder, mesh\) on every rank"):
        sharded.save_pretrained(folder / "refused")
    with pytest.raises(RunError, match="shards of one rank"):
        sharded.model.save_pretrained(folder / "refused")
    assert not (folder / "refused").exists()
    whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in sharded.state_dict().items()}
    if rank == 0:
        sharded.save_pretrained(folder / "gathered", state_dict=whole)
        for written in ("whole", "gathered"):
            found = LlamaForCausalLM.from_pretrained(folder / written, dtype=torch.float64).state_dict()
            for name, x in reference.items():
                torch.testing.assert_close(found[name], x, rtol=0, atol=0)
