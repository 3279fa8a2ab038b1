"""The fused operators of the CPU: keys in pieces of a cache's size, halves as the CPU can multiply them."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longspan.kernels import flash_cpu as flash
from longspan.kernels import matmul as products
from longspan.kernels import sdpa
from longspan.kernels.reference import Reference
from longspan.kernels.sdpa import SDPA
from longspan.kernels.tiles import Shape, columns, plan
from longspan.masks.constructors import Mask, Window
from tests.helpers.examples import examples
from tests.helpers.kernel_cases import Inputs, assert_same, attentions, bands_of, draw_inputs, run

# beartype looks at a random item of each list that it checks
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")


@examples(few=12, many=250)
@given(attention=attentions(), keys=st.integers(1, 150))
def test_a_column_of_keys_at_a_time_is_the_whole(attention: tuple[Mask, Inputs], keys: int) -> None:
    mask, x = attention
    bands = bands_of(mask, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "_stacks", lambda bands: columns(plan(bands), keys))
        assert all(stack.count > 1 or stack.keys <= keys for stack in columns(plan(bands), keys) if stack.shape in CUT)
        assert_same(run(SDPA(), x, bands), run(Reference(), x, bands), 1e-10)


CUT = (Shape.LOWER, Shape.RECTANGLE)


@pytest.mark.parametrize("slow", [frozenset({torch.bfloat16}), frozenset()], ids=["slow", "fast"])
def test_halves_are_multiplied_as_the_cpu_can(slow: frozenset[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU without products of bf16 is given is fp32, and gradients in fp32 of the same numbers are no less exact."""
    given: set[torch.dtype] = set()
    monkeypatch.setattr(products, "SLOW_ON_CPU", slow)
    operator = flash._backward_cpu

    def backward(dout: Tensor, *args: Any, **kwargs: Any) -> Any:
        given.add(dout.dtype)
        return operator(dout, *args, **kwargs)

    monkeypatch.setattr(flash, "_backward_cpu", backward)
    x = draw_inputs(70, 70, heads=4, kv_heads=2, dim=32, dtype=torch.bfloat16)
    bands = Window(20).bands(70, 70)
    assert_same(run(SDPA(), x, bands), run(Reference(), Inputs(*(t.double() for t in x)), bands), 0.02)
    assert given == {torch.float32 if slow else torch.bfloat16}
