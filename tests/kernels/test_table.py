"""The choice of a kernel, and what each kernel refuses by name."""

from typing import Any

import pytest
import torch

from longspan.errors import KernelError
from longspan.kernels import flex
from longspan.kernels.online import Online
from longspan.kernels.protocol import Kernel
from longspan.kernels.sdpa import SDPA
from longspan.kernels.table import KERNELS, PREFERENCES, choose
from longspan.masks.constructors import Causal
from tests.helpers.kernel_cases import Slopes, draw_inputs, run


def ask(kernel: Any, **changes: Any) -> Kernel:
    need: dict[str, Any] = {"device_type": "cpu", "dtype": torch.float32, "qk_dim": 64, "v_dim": 64}
    return choose(kernel, **(need | changes))


def test_auto_takes_the_fused_operators_where_they_can() -> None:
    assert ask("auto").name == "sdpa"
    assert ask("auto", softcap=30.0).name == "online"
    assert ask("auto", v_dim=32).name == "online"
    assert ask("auto", bias=Slopes(2)).name == "online"
    assert ask("auto", device_type="cuda").name == "flex"
    assert ask("auto", device_type="cuda", dtype=torch.bfloat16, softcap=30.0).name == "flex"
    assert ask("auto", device_type="cuda", dtype=torch.bfloat16, v_dim=128).name == "flex"
    assert ask("auto", device_type="cuda", dtype=torch.float64).name == "online"
    assert ask("auto", device_type="cuda", bias=Slopes(2)).name == "online"
    assert ask("auto", device_type="cuda", qk_dim=8, v_dim=8).name == "online"
    assert ask("auto", device_type="xpu").name == "online"
    assert ask("auto", device_type="cuda", dtype=torch.bfloat16).name == "sdpa"
    assert ask("flex", device_type="cuda").name == "flex"
    mine = Online()
    assert ask(mine) is mine


def test_a_choice_for_a_gpu_says_that_it_was_never_measured() -> None:
    assert [(row.device_type, row.basis.partition(":")[0]) for row in PREFERENCES if row.device_type != "cpu"] == [
        ("cuda", "assumed")
    ]
    assert all(set(row.kernels) <= set(KERNELS) for row in PREFERENCES)


@pytest.mark.parametrize(
    ("kernel", "changes", "text"),
    [
        ("fused", {}, r"kernel='fused' is unknown; use 'auto', 'sdpa', 'online', 'flex', 'reference', or a function"),
        ("sdpa", {"softcap": 30.0}, r"kernel='sdpa' cannot do this: .* has no softcap; use 'online' or 'reference'"),
        ("sdpa", {"bias": Slopes(2)}, r"has no bias; use 'online' or 'reference'"),
        ("sdpa", {"v_dim": 32}, r"wants equal query/key and value dims, not 64 and 32; use 'online'"),
        ("sdpa", {"device_type": "cuda"}, r"takes fp16 and bf16, not torch.float32; use 'online' or 'flex'"),
        ("sdpa", {"device_type": "cuda", "dtype": torch.half, "qk_dim": 20, "v_dim": 20}, r"multiples of 8 up to 256, not 20"),
        ("sdpa", {"device_type": "mps"}, r"are for cpu and cuda, not mps"),
        ("flex", {}, r"kernel='flex' cannot do this: flex_attention has no backward on cpu, only on cuda; use 'sdpa'"),
        ("flex", {"device_type": "cuda", "bias": Slopes(2)}, r"a bias score by score, not tile by tile"),
        ("flex", {"device_type": "cuda", "dtype": torch.float64}, r"not for fp64"),
    ],
)
def test_what_a_kernel_lacks_is_refused(kernel: str, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(KernelError, match=text):
        ask(kernel, **changes)


def test_kernels_refuse_by_themselves_too() -> None:
    x, bands = draw_inputs(5, 5), Causal().bands(5, 5)
    with pytest.raises(KernelError, match="kernel='sdpa' has neither softcap nor bias; use kernel='online'"):
        SDPA().forward(x.q, x.k, x.v, bands, 0.3, softcap=30.0)
    with pytest.raises(KernelError, match="no backward on cpu"):
        run(flex.Flex(), x, bands)
    assert [name for name, kernel in KERNELS.items() if kernel.name != name] == []
