"""The import hook of the tests checks the shapes of signatures: without it, every shape in the package is only a comment."""

import jaxtyping
import pytest
import torch

from longspan import Causal, MemoryOptions, attend
from longspan.kernels.flash_cpu import forward
from tests.helpers.shapes import ALIASES


@pytest.mark.parametrize("shape", [(1, 5, 2), (1, 1, 5, 2, 4)])
def test_a_wrong_shape_is_an_error(shape):
    q = torch.zeros(1, 5, 2, 4)
    with pytest.raises(jaxtyping.TypeCheckError):
        attend(q, torch.zeros(shape), torch.zeros(1, 5, 2, 4), mask=Causal())


def test_a_shape_that_has_a_name_is_checked_too():
    assert "Partial" in ALIASES
    assert hasattr(forward, "__wrapped__")


def test_what_has_no_shape_is_not_wrapped():
    assert not hasattr(Causal.bands, "__wrapped__")
    assert not hasattr(MemoryOptions.__post_init__, "__wrapped__")
