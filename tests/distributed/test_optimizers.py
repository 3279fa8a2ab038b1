"""Every optimizer of PyTorch, and Transformers' own, on sharded parameters: the weights of ``zero=0``, or a refusal by name."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch.distributed.tensor import DTensor

from longspan import ModelError, parallelize, shard_batch
from longspan.models.decoder import Decoder
from tests.helpers.hf_models import batches
from tests.helpers.memory_models import SHAPE
from tests.helpers.ranks import Ranks, mesh_of

REFUSED = {"Adafactor", "LBFGS", "Rprop"}
SETTINGS = {"LBFGS": {"max_iter": 2}, "transformers.Adafactor": {"relative_step": False, "scale_parameter": False}}


def optimizers() -> dict[str, Any]:
    """All of torch.optim, also those of a newer version; SparseAdam takes no dense gradients on one device either."""
    found = {
        name: kind
        for name, kind in vars(torch.optim).items()
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", "SparseAdam")
    }
    return found | {"transformers.Adafactor": transformers.Adafactor}


@pytest.mark.long
@pytest.mark.parametrize(
    ("ranks", "degrees", "zero"), [(2, {"ulysses": 2}, 3), (2, {"tensor": 2}, 0), (4, {"ulysses": 2, "tensor": 2}, 3)]
)
def test_every_optimizer_trains_shards_as_whole_parameters_or_is_refused(
    ranks: int, degrees: dict[str, int], zero: int, pool: Callable[[int], Ranks]
) -> None:
    for found in pool(ranks).run(train_with_each, degrees, zero):
        refused = {name.removeprefix("transformers.") for name, error in found.items() if error is None}
        assert refused == REFUSED
        assert found.pop("Muon") < 5e-3  # it works on whole matrices in bfloat16
        assert all(error < 1e-6 for error in found.values() if error is not None), found


def train_with_each(degrees: dict[str, int], zero: int) -> dict[str, float | None]:
    """The relative difference of the weights after two steps, by optimizer; None where it was refused before the first."""
    found: dict[str, float | None] = {}
    for name, kind in optimizers().items():
        whole = train(name, kind, {"ulysses": 2}, 0)
        if kind.__name__ in REFUSED:
            with pytest.raises(ModelError, match=f"{kind.__name__} cannot update sharded parameters .* use AdamW, SGD"):
                train(name, kind, degrees, zero)
            found[name] = None
        else:
            found[name] = ((train(name, kind, degrees, zero) - whole).norm() / whole.norm()).item()
    return found


def train(name: str, kind: Any, degrees: dict[str, int], zero: int) -> torch.Tensor:
    """All weights after two steps."""
    mesh, ids = mesh_of(**degrees), batches("odd length", False)["input_ids"]
    model = parallelize(Decoder(SHAPE, seed=0).double(), mesh, zero=zero)
    trained = [parameter for parameter in model.parameters() if name != "Muon" or parameter.ndim == 2]
    optimizer = kind(trained, lr=1e-2, **SETTINGS.get(name, {}))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(**shard_batch({"input_ids": ids, "labels": ids}, mesh)).loss
        loss.backward()
        return loss

    for _ in range(2):
        if name == "LBFGS":
            optimizer.step(closure)
        else:  # Transformers' own calls a closure without gradients
            closure()
            optimizer.step()
    weights = (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter for parameter in model.parameters())
    return torch.cat([weight.detach().flatten() for weight in weights])
