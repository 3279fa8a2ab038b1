"""The dense oracle, and the online kernel, give the numbers of autograd through a naive softmax."""

import pytest

from longspan.kernels.online import Online
from longspan.kernels.protocol import Kernel
from longspan.kernels.reference import Reference
from longspan.masks.constructors import Causal, Documents, Full, Mask, Span, Window
from tests.helpers.kernel_cases import Slopes, assert_same, bands_of, draw_inputs, naive, run


@pytest.mark.parametrize("mask", [Causal(), Full(), Window(5, 2), Span(4, 20), Documents((9, 0, 20)) & Causal()], ids=repr)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kernel", [Reference(), Online()], ids=lambda kernel: kernel.name)
def test_dense_formula(kernel: Kernel, mask: Mask, softcap: float | None, biased: bool) -> None:
    x = draw_inputs(29, 29, heads=6, kv_heads=2, dim=5, v_dim=3)
    bias = Slopes(6) if biased else None
    extras = {"softcap": softcap, "bias": bias}
    assert_same(run(kernel, x, bands_of(mask, x), **extras), naive(x, bands_of(mask, x), 0.3, **extras), 1e-10)
