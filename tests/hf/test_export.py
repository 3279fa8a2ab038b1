"""A folder that a parallel model writes holds what was trained, on every axis, and is read by from_pretrained and by load."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from longspan import ModelError, ParallelMesh, forward_backward, parallelize, shard_batch
from longspan.distributed.consensus import gather
from longspan.hf import export
from longspan.hf.export import save
from longspan.hf.weights import load
from tests.helpers.folders import whole, write
from tests.helpers.hf_models import BASE
from tests.helpers.ranks import Ranks

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def saved(folder: str, out: str, zero: int, degrees: dict[str, int]) -> None:
    export.FILE_BYTES = 2**15  # several files
    mesh = ParallelMesh(**degrees)
    model = parallelize(load(folder), mesh, zero=zero)
    ids = torch.arange(3, 27).reshape(1, 24)
    parts = shard_batch([{"input_ids": ids, "labels": ids}], mesh)
    forward_backward(model, parts)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with torch.no_grad():  # leaves FSDP2's outermost parameters gathered
        forward_backward(model.eval(), parts)
    save(model, out, mesh)
    save(model, out, mesh)
    trained: dict[str, Tensor] = {}
    for held in gather({name: whole(parameter).detach() for name, parameter in model.named_parameters()}, mesh.world_group):
        trained |= held
    read = AutoModelForCausalLM.from_pretrained(out)
    assert type(read) is LlamaForCausalLM
    for name, parameter in read.named_parameters():
        assert torch.equal(parameter, trained[name]), name
    assert sum(map(len, map(load_file, Path(out).glob("*.safetensors")))) == len(list(read.named_parameters()))
    again = parallelize(load(out), mesh, zero=3)
    assert all(torch.equal(whole(parameter), trained[name]) for name, parameter in again.named_parameters())


ULYSSES, BOTH, STAGES = {"ulysses": 2}, {"ulysses": 2, "tensor": 2}, {"pipeline": 2}
CASES = [
    (True, 3, 2, ULYSSES), (False, 3, 2, ULYSSES), (True, 0, 2, ULYSSES), (True, 3, 4, BOTH), (False, 0, 4, BOTH),
    (True, 0, 2, STAGES), (False, 3, 4, STAGES), (True, 2, 4, STAGES | {"tensor": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("tied", "zero", "ranks", "degrees"), CASES, ids=str)
def test_what_is_saved_is_what_was_trained(
    tied: bool, zero: int, ranks: int, degrees: dict[str, int], tmp_path: Path, pool: Callable[[int], Ranks]
) -> None:
    out = tmp_path / "out" / "model"
    pool(ranks).run(saved, write(tmp_path / "in", tied), str(out), zero, degrees)
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    assert len(list(out.glob("model-*.safetensors"))) > 1
    kept = json.loads((out / "config.json").read_text())
    assert (kept["architectures"], kept["dtype"], kept["use_cache"]) == (["LlamaForCausalLM"], "float32", True)
    assert not (out / "sharded").exists()


def test_a_config_that_other_models_share_is_not_written_to(tmp_path: Path) -> None:
    config = LlamaConfig(**BASE, dtype="float32")
    before = config.to_dict()
    model = LlamaForCausalLM(config).double()
    for folder in ("alone", "parallel"):
        mesh = ParallelMesh()
        save(model if folder == "alone" else parallelize(model, mesh), tmp_path / folder, mesh)
        kept = json.loads((tmp_path / folder / "config.json").read_text())
        assert (kept["architectures"], kept["dtype"]) == (["LlamaForCausalLM"], "float64")
        assert config.to_dict() == before


def saved_nowhere(folder: str, out: str) -> str:
    mesh = ParallelMesh()
    model = parallelize(load(folder), mesh, zero=3)
    with pytest.raises(ModelError) as error:
        save(model, out, mesh)
    return str(error.value)


def test_a_folder_that_cannot_be_made_is_refused_on_every_rank(tmp_path: Path, pool: Callable[[int], Ranks]) -> None:
    (tmp_path / "a file").touch()
    one, other = pool(2).run(saved_nowhere, write(tmp_path / "in"), str(tmp_path / "a file" / "out"))
    assert one == other
    assert "cannot be saved to" in one
    assert "; make room, or name another folder" in one


def saved_beside(folder: str, out: str) -> None:
    model, mesh = parallelize(load(folder), ParallelMesh(ulysses=2)), ParallelMesh(ulysses=2)
    export.FILE_BYTES = 2**15
    save(model, out, mesh)  # several files
    export.FILE_BYTES = 2**30
    save(model, f"{out}/sub/..", mesh)  # one file


def test_other_files_of_the_folder_stay_and_weights_of_before_go(tmp_path: Path, pool: Callable[[int], Ranks]) -> None:
    out = tmp_path / "out"
    for kept in (out / "tokenizer.json", out / "sub" / "notes.txt", tmp_path / ".out" / "key"):
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text("mine")
    pool(2).run(saved_beside, write(tmp_path / "in"), str(out))
    assert sorted(path.name for path in out.iterdir() if path.suffix == ".safetensors") == ["model-00001-of-00001.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out", "in", "out"]
    for kept in (out / "tokenizer.json", out / "sub" / "notes.txt", tmp_path / ".out" / "key"):
        assert kept.read_text() == "mine"
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size


def test_the_current_folder_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(parallelize(LlamaForCausalLM(LlamaConfig(**BASE)), ParallelMesh()), "", ParallelMesh())
    assert (tmp_path / "config.json").exists()
