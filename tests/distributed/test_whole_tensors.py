"""A sharded model loads the whole tensors of one device."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch

from longspan import LongspanError, parallelize, shard_batch
from tests.helpers.hf_models import assert_gradients, batches, build, forward_alone
from tests.helpers.ranks import Ranks, mesh_of


@pytest.mark.parametrize("zero", [2, 3])
def test_a_sharded_model_loads_whole_tensors(zero: int, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(loads, zero)


def loads(zero: int) -> None:
    mesh, reference, whole = mesh_of(2), build("llama"), batches("odd length", False)
    model = parallelize(deepcopy(reference), mesh, zero=zero)
    held = {name: value * 0.5 for name, value in reference.state_dict().items()}
    for each in (reference, model):
        each.load_state_dict(held)
    expected, _ = forward_alone(reference, whole, False)
    expected.backward()
    part = shard_batch(whole, mesh)
    found = model(**part).loss
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    assert_gradients(model, reference, 1e-9)
    model.load_state_dict(held, assign=True)
    with pytest.raises(LongspanError, match="was added or replaced after parallelize"):
        model(**part)
    with pytest.raises(RuntimeError, match=r"size mismatch for lm_head\.weight"):
        model.load_state_dict(held | {"lm_head.weight": torch.zeros(3, 4)})
