"""The dense oracle, and the online kernel, give the numbers of autograd through a naive softmax."""

import pytest
import torch

from longspan.kernels.online import Online
from longspan.kernels.protocol import Kernel
from longspan.kernels.reference import Reference
from longspan.masks.constructors import Causal, Documents, Full, Mask, Span, Window
from tests.helpers.kernel_cases import Distance, Slopes, assert_same, bands_of, draw_inputs, naive, run


@pytest.mark.parametrize("mask", [Causal(), Full(), Window(5, 2), Span(4, 20), Documents((9, 0, 20)) & Causal()], ids=repr)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kernel", [Reference(), Online()], ids=lambda kernel: kernel.name)
def test_dense_formula(kernel: Kernel, mask: Mask, softcap: float | None, biased: bool) -> None:
    x = draw_inputs(29, 29, heads=6, kv_heads=2, dim=5, v_dim=3)
    bias = Slopes(6) if biased else None
    extras = {"softcap": softcap, "bias": bias}
    assert_same(run(kernel, x, bands_of(mask, x), **extras), naive(x, bands_of(mask, x), 0.3, **extras), 1e-10)


class WithUnused(Slopes):
    """Slopes of two heads with a parameter that they do not use."""

    def __init__(self, unused: torch.Tensor) -> None:
        super().__init__(2)
        self.parameters = (*self.parameters, unused)


@pytest.mark.parametrize("kernel", [Reference(), Online()], ids=lambda kernel: kernel.name)
def test_what_a_bias_does_not_learn_has_a_gradient_of_zero(kernel: Kernel) -> None:
    x, bands, frozen = draw_inputs(20, 20), Causal().bands(20, 20), Slopes(2)
    frozen.parameters[0].requires_grad_(False)
    learned, fixed = naive(x, bands, 0.3, bias=Slopes(2)), naive(x, bands, 0.3, bias=Distance())
    unused = torch.ones(3, requires_grad=True)
    assert_same(run(kernel, x, bands, bias=frozen), learned | {"dbias0": torch.zeros(2)}, 1e-10)
    assert_same(run(kernel, x, bands, bias=WithUnused(unused)), learned | {"dbias2": torch.zeros(3)}, 1e-10)
    assert_same(run(kernel, x, bands, bias=Distance()), fixed, 1e-10)
    assert_same(run(kernel, x, bands, bias=Distance(unused)), fixed | {"dbias0": torch.zeros(3)}, 1e-10)
