"""Folders of weights: each rank reads its share, and the model is the one that from_pretrained gives."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from longspan import ModelError, ParallelMesh, parallelize, shard_batch
from longspan.hf.weights import load
from tests.helpers.folders import SMALL, whole, write
from tests.helpers.hf_models import KINDS, build
from tests.helpers.ranks import Ranks

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _leave_no_group_behind() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def steps(model: Any, mesh: ParallelMesh) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of two steps, and the gradients of the first."""
    ids = torch.randint(3, 97, (mesh.coordinate.data, 1, 23), generator=torch.Generator().manual_seed(1))[
        mesh.coordinate.data_rank
    ]
    optimizer, losses, grads = torch.optim.AdamW(model.parameters(), lr=1e-2), [], {}
    for _ in range(2):
        loss = model(**shard_batch({"input_ids": ids, "labels": ids}, mesh)).loss
        loss.backward()
        grads = grads or {name: whole(parameter.grad).clone() for name, parameter in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, grads


def same_as_from_pretrained(folder: str, degrees: dict[str, int], zero: int) -> None:
    mesh = ParallelMesh(**degrees)
    expected, wanted = steps(parallelize(LlamaForCausalLM.from_pretrained(folder), mesh, zero=zero), mesh)
    model = parallelize(load(folder), mesh, zero=zero)
    reference = LlamaForCausalLM.from_pretrained(folder)
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(whole(mine), theirs), name
        assert not zero or isinstance(mine, DTensor)
    for (name, buffer), same in zip(model.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(buffer, same), name
    found, grads = steps(model, mesh)
    assert found == expected
    for name in wanted:
        assert torch.equal(grads[name], wanted[name]), name


BOTH = {"tensor": 2, "ulysses": 2}
LONG = pytest.mark.long  # the pairs that stay hold every layout, tied and not, sharded and not


@pytest.mark.parametrize(
    ("ranks", "degrees", "zero", "tied"),
    [
        (2, {"ulysses": 2}, 3, True), (2, {}, 0, True), (4, BOTH, 3, True),
        pytest.param(4, {"ulysses": 2}, 3, False, marks=LONG),
        pytest.param(4, {"ulysses": 2}, 3, True, marks=LONG), pytest.param(2, {"ulysses": 2}, 3, False, marks=LONG),
        pytest.param(2, {}, 0, False, marks=LONG), pytest.param(4, {"tensor": 2}, 2, False, marks=LONG),
        pytest.param(2, {"tensor": 2}, 0, True, marks=LONG),
    ],
)  # fmt: skip
def test_a_rank_s_share_of_the_files_trains_as_the_whole(
    tied: bool, ranks: int, degrees: dict[str, int], zero: int, tmp_path: Path, pool: Callable[[int], Ranks]
) -> None:
    pool(ranks).run(same_as_from_pretrained, write(tmp_path, tied), degrees, zero)


# ---- never whole on one rank


class Held(TorchDispatchMode):
    """The largest sum of bytes that were alive at once, of floats made or touched within it but activations.

    FSDP2 frees by resizing to 0. The proof's activations have 7 or 14 tokens, and no other size here is a multiple of 7.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: WeakValueDictionary[int, Any] = WeakValueDictionary()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, DTensor) or not isinstance(tensor, Tensor) or tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            if tensor.is_floating_point() and storage.nbytes() % 7:
                self.live[storage._cdata] = storage
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.live.values()))
        return out


def peak_of_loading(folder: str) -> int:
    mesh, held = ParallelMesh(), Held()
    with held:
        parallelize(load(folder), mesh, zero=3)
    return held.peak


LAYERS = {"num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 256}


@pytest.mark.parametrize("drawn", [False, pytest.param(True, marks=pytest.mark.long)])
def test_no_rank_holds_more_than_its_share_and_a_block(drawn: bool, tmp_path: Path, pool: Callable[[int], Ranks]) -> None:
    folder = write(tmp_path, **LAYERS)
    model = LlamaForCausalLM.from_pretrained(folder)
    if drawn:
        for file in tmp_path.glob("*.safetensors*"):
            file.unlink()
    whole = sum(parameter.nbytes for parameter in model.parameters())
    block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    outermost = whole - LAYERS["num_hidden_layers"] * block
    for peak in pool(4).run(peak_of_loading, folder):
        # FSDP2 holds a block three times at most: as it is gathered, as it is computed with, and the one before it
        assert peak < 1.01 * (whole / 4 + outermost + 3 * block) < whole / 1.5


# ---- random weights of a config alone


def drawn(folder: str, zero: int, tensor: int) -> dict[str, Tensor]:
    before = torch.get_rng_state()
    model = parallelize(load(folder, seed=3), ParallelMesh(tensor=tensor), zero=zero)
    assert torch.equal(before, torch.get_rng_state())
    return {name: whole(tensor).detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("tied", [False, True])
def test_random_weights_depend_on_config_and_seed_alone(tied: bool, tmp_path: Path, pool: Callable[[int], Ranks]) -> None:
    config = LlamaConfig(**SMALL, tie_word_embeddings=tied, initializer_range=0.1, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    four = [found for tensor in (1, 2) for found in pool(4).run(drawn, str(tmp_path), 3, tensor)]
    found = [*four, *pool(2).run(drawn, str(tmp_path), 0, 1)]
    for weights in found:
        assert weights.keys() == found[0].keys()
        assert all(torch.equal(weights[name], found[0][name]) for name in weights)
    for name, weight in found[0].items():
        if weight.ndim > 1:
            assert weight.std().item() == pytest.approx(0.1, rel=0.1), name
        else:
            assert torch.equal(weight, torch.ones_like(weight)), name
    rows = {name: tuple(weight.flatten()[:3].tolist()) for name, weight in found[0].items() if weight.ndim > 1}
    assert len({*rows.values()}) == len(rows) - tied  # no two tensors are drawn alike but those that are one


# ---- every kind of model: buffers that no file holds, tensors that are tied, experts that are fused


def as_the_library_loads_it(name: str, folder: str) -> None:
    mesh, kind = ParallelMesh(), getattr(transformers, KINDS[name].model)
    reference = kind.from_pretrained(folder)
    model = parallelize(load(folder), mesh, zero=3)
    for (key, mine), theirs in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(whole(mine), theirs), key
    for (key, mine), theirs in zip(model.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(mine, theirs), key


USUAL = ("gemma3", "deepseek_v3", "bert")


@pytest.mark.parametrize("name", [name if name in USUAL else pytest.param(name, marks=pytest.mark.long) for name in KINDS])
def test_every_kind_is_read_as_the_library_reads_it(name: str, tmp_path: Path, pool: Callable[[int], Ranks]) -> None:
    build(name).float().save_pretrained(tmp_path, save_original_format=False)
    pool(2).run(as_the_library_loads_it, name, str(tmp_path))


# ---- refusals


def refused(folders: list[str]) -> str:
    """The text with which the model is refused, of which this rank was given its own folder."""
    mesh = ParallelMesh()
    with pytest.raises(ModelError) as error:
        parallelize(load(folders[mesh.coordinate.data_rank]), mesh, zero=3)
    return str(error.value)


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path, pool: Callable[[int], Ranks]) -> None:
    torch.manual_seed(0)
    good = LlamaForCausalLM(LlamaConfig(**SMALL))
    folders = {}
    for case in ("good", "other", "lacking", "more", "wide", "bin", "shard_local", "twice"):
        good.save_pretrained(tmp_path / case)
        folders[case] = str(tmp_path / case)
        file = tmp_path / case / "model.safetensors"
        tensors = load_file(file)
        if case == "other":
            tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
        if case == "lacking":
            del tensors["model.norm.weight"]
        if case == "more":
            tensors |= {"score.weight": torch.zeros(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
        if case == "wide":
            tensors["model.norm.weight"] = torch.zeros(33)
        save_file(tensors, file, {"format": "pt"})
        if case == "bin":
            file.rename(tmp_path / case / "pytorch_model.bin")
        if case == "shard_local":
            file.write_bytes(file.read_bytes()[:-9])
        if case == "twice":
            shutil.copy(file, tmp_path / case / "copy.safetensors")
    ranks = pool(2)
    for case, text in {
        "lacking": "holds no model.norm.weight, which LlamaForCausalLM has; load it whole with LlamaForCausalLM.from_",
        "more": "holds score.weight, which LlamaForCausalLM has not; load it whole",
        "wide": "holds model.norm.weight of shape (33,), and LlamaForCausalLM has (32,); load it whole",
        "bin": "holds pytorch_model.bin, which cannot be read in parts; load it with from_pretrained and write it with ",
        "shard_local": "cannot be read: ",
        "twice": "twice, once in model.safetensors; keep one of them",
    }.items():
        one, other = ranks.run(refused, [folders["good"], folders[case]])
        assert one == other
        assert text in one
    one, other = ranks.run(refused, [folders["good"], folders["other"]])
    assert one == other
    assert one.startswith("the model differs between ranks: model.norm.weight is ")


def test_fused_experts_are_refused_with_a_way_out_that_works(tmp_path: Path, pool: Callable[[int], Ranks]) -> None:
    build("mixtral").save_pretrained(tmp_path / "original")
    one, _ = pool(2).run(refused, [str(tmp_path / "original")] * 2)
    assert "save_pretrained(..., save_original_format=False) and load what it wrote" in one


def test_tied_weights_that_differ_are_refused(tmp_path: Path, pool: Callable[[int], Ranks]) -> None:
    write(tmp_path, tied=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    one, _ = pool(2).run(refused, [str(tmp_path)] * 2)
    assert "holds different " in one
    assert "which its config ties; set tie_word_embeddings to false there" in one


def test_a_proof_that_fails_is_the_same_refusal_on_every_rank(tmp_path: Path, pool: Callable[[int], Ranks]) -> None:
    config = transformers.MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4)
    config.architectures = ["MambaForCausalLM"]
    config.save_pretrained(tmp_path)
    one, other = pool(2).run(refused, [str(tmp_path)] * 2)
    assert one == other
    assert "mixes tokens outside attention" in one


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "has no config.json; name one that a Hugging Face model's save_pretrained wrote"),
        ("{", "is of no model that Transformers "),
        ('{"model_type": "klingon"}', "is of no model that Transformers "),
        ('{"model_type": "llama", "architectures": ["Klingon"]}', "names Klingon, which is no model of Transformers "),
    ],
)
def test_a_folder_without_a_model_is_refused(content: str | None, text: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError) as error:
        load(tmp_path)
    assert text in str(error.value)
    with pytest.raises(ModelError, match="does not exist; name one that"):
        load(tmp_path / "nowhere")
