"""What every deviation gets and gives: the protocol, findings by type, and undoing hooks."""

from typing import Any

import pytest
import torch
from torch import nn

from longspan import MemoryOptions, ParallelMesh
from longspan.hf.adapter import DEVIATIONS
from longspan.hf.candidate import Candidate, Deviation, remove_all
from longspan.hf.dummy_row import DummyRow
from longspan.hf.loss import Loss


@pytest.mark.parametrize("deviation", DEVIATIONS, ids=lambda module: module.__name__)
def test_every_deviation_has_a_probe(deviation: Any) -> None:
    assert isinstance(deviation, Deviation)


def test_findings_are_open_by_their_type() -> None:
    found = DummyRow()
    candidate = Candidate(None, None, ParallelMesh(), MemoryOptions(), "auto", (), {DummyRow: found})
    assert candidate.finding(DummyRow) is found
    assert candidate.finding(Loss) is None


def test_hooks_are_removed_together_and_no_others() -> None:
    module, calls = nn.Linear(2, 2), []
    module.register_forward_hook(lambda *_: calls.append("mine"))
    undo = remove_all([module.register_forward_hook(lambda *_: calls.append("ours")) for _ in range(2)])
    module(torch.ones(2))
    undo()
    module(torch.ones(2))
    assert calls == ["mine", "ours", "ours", "mine"]
