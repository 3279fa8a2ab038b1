"""A model holds the call that it computes, and nothing when it computes none."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from longspan import ParallelMesh, shard_local
from longspan.hf.step_scope import Call, Scope, ScopedModel, needs_scope, own_forward, scope_of
from tests.helpers.hf_models import build


def test_calls_are_held_one_within_the_other() -> None:
    scope = Scope()
    with scope.during(Call("outer")):
        with scope.during(Call("inner")):
            assert scope.call.step == "inner"
        assert scope.call.step == "outer"
    assert scope.call == Call()
    assert scope_of(nn.Identity()).call == Call()


def test_a_model_and_its_layers_hold_the_step_of_their_call_until_it_ends_or_fails() -> None:
    model, seen = build("llama"), []
    attention = model.model.layers[1].self_attn
    handle = attention.register_forward_pre_hook(lambda module, _: seen.append(scope_of(module).call.step))
    scoped = ScopedModel(model)
    model(input_ids=torch.ones(1, 4, dtype=torch.long), longspan="step")
    with pytest.raises(TypeError):
        model(input_ids="none", longspan="step")
    assert seen == ["step"]
    assert scope_of(attention).call == Call()
    scoped.remove()
    handle.remove()
    assert not [module for module in model.modules() if "_longspan_scope" in vars(module) or "forward" in vars(module)]


def test_a_forward_is_called_without_what_it_has_no_place_for() -> None:
    class Narrow(nn.Module):
        def forward(self, input_ids: int, labels: int | None = None) -> tuple[int, int | None]:
            return input_ids, labels

    assert own_forward(Narrow())(input_ids=1, labels=2, longspan=None, position_ids=3, shift_labels=4) == (1, 2)
    step = shard_local({"input_ids": torch.ones(1, 4, dtype=torch.long)}, ParallelMesh().coordinate)["longspan"]
    assert own_forward(Narrow())(input_ids=1, longspan=step, position_ids=3) == (1, None)
    given = replace(step, positions_counted=False)
    with pytest.raises(TypeError, match="position_ids"):  # of the caller
        own_forward(Narrow())(input_ids=1, longspan=given, position_ids=3)
    with pytest.raises(TypeError, match="unknown"):
        own_forward(Narrow())(input_ids=1, unknown=2)
    assert needs_scope(Narrow())
    assert not needs_scope(build("llama"))
