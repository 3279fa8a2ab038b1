"""The choice of a kernel, and what each kernel refuses by name."""

from typing import Any

import pytest
import torch

from longspan.errors import KernelError
from longspan.kernels import flex, table
from longspan.kernels.online import Online
from longspan.kernels.protocol import Kernel
from longspan.kernels.sdpa import SDPA
from longspan.kernels.table import KERNELS, PREFERENCES, choose
from longspan.masks.constructors import Causal, Documents, Full, Window
from tests.helpers.kernel_cases import Slopes, draw_inputs, run


def ask(kernel: Any, **changes: Any) -> Kernel:
    need: dict[str, Any] = {"device_type": "cpu", "dtype": torch.float32, "qk_dim": 64, "v_dim": 64}
    return choose(kernel, **(need | changes))


def test_auto_takes_the_fused_operators_where_they_can() -> None:
    assert ask("auto").name == "sdpa"
    assert ask("auto", softcap=30.0).name == "online"
    assert ask("auto", v_dim=32).name == "online"
    assert ask("auto", bias=Slopes(2)).name == "online"
    assert ask("auto", device_type="xpu").name == "online"
    mine = Online()
    assert ask(mine) is mine


BF16 = {"device_type": "cuda", "dtype": torch.bfloat16, "qk_dim": 128, "v_dim": 128, "tokens": 131_072}
FP32 = BF16 | {"dtype": torch.float32}


@pytest.mark.parametrize(
    ("capability", "need", "kernel"),
    [
        ((9, 0), BF16 | {"mask": Causal()}, "cudnn"),
        ((9, 0), BF16 | {"mask": (Full(), Full())}, "cudnn"),
        ((9, 0), BF16 | {"mask": (Full(), Causal())}, "sdpa"),
        ((9, 0), BF16 | {"mask": Window(255)}, "sdpa"),
        ((9, 0), BF16 | {"mask": Causal(), "tokens": 1000}, "sdpa"),
        ((9, 0), BF16 | {"mask": Causal(), "qk_dim": 256, "v_dim": 256}, "sdpa"),
        ((8, 0), BF16 | {"mask": Causal()}, "sdpa"),
        (None, BF16 | {"mask": Causal()}, "sdpa"),
        ((7, 5), BF16 | {"dtype": torch.float16, "mask": Causal()}, "efficient"),
        ((9, 0), BF16 | {"mask": Causal(), "softcap": 30.0}, "flex"),
        ((9, 0), BF16 | {"mask": Causal(), "v_dim": 64}, "flex"),
        ((9, 0), BF16 | {"mask": Causal(), "bias": Slopes(2)}, "efficient"),
        ((9, 0), FP32 | {"mask": Causal()}, "efficient"),
        ((9, 0), FP32 | {"mask": Full()}, "efficient"),
        ((9, 0), FP32 | {"mask": Causal(), "bias": Slopes(2)}, "efficient"),
        ((9, 0), FP32 | {"mask": Documents((5, 6))}, "flex"),
        ((9, 0), FP32 | {"mask": Causal(), "softcap": 30.0}, "flex"),
        ((9, 0), FP32 | {"mask": Causal(), "qk_dim": 6, "v_dim": 6}, "online"),
        ((9, 0), FP32 | {"mask": Causal(), "dtype": torch.float64}, "online"),
    ],
)
def test_auto_on_cuda(
    capability: tuple[int, int] | None, need: dict[str, Any], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "capability", lambda: capability)
    monkeypatch.setitem(table.TRIALS, "cudnn", lambda: True)
    assert ask("auto", **need).name == kernel


def test_auto_takes_no_kernel_whose_trial_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "capability", lambda: (9, 0))
    monkeypatch.setitem(table.TRIALS, "cudnn", lambda: False)
    assert ask("auto", **BF16, mask=Causal()).name == "sdpa"
    assert ask("cudnn", **BF16, mask=Causal()).name == "cudnn"


def test_each_row_says_what_it_rests_on() -> None:
    """Nothing has run on a GPU, so that a row for one is "assumed", until a run there makes it "measured on CARD, DATE"."""
    for row in PREFERENCES:
        assert row.basis.startswith("assumed: " if row.device_type == "cuda" else "measured on two CPU cores")
        assert set(row.kernels) <= set(KERNELS)
        assert "online" in row.kernels  # which supports every attention


def test_the_kind_of_a_mask_is_that_of_every_row() -> None:
    assert [table.kind_of(mask) for mask in (Causal(), Full(), Window(3), Documents((5, 6)) & Causal(), ())] == [
        "causal", "full", "other", "other", "other",
    ]  # fmt: skip
    assert table.kind_of((Causal(), Causal())) == "causal"
    assert table.kind_of((Causal(), Window(3))) == "other"


@pytest.mark.parametrize(
    ("kernel", "changes", "text"),
    [
        (
            "fused",
            {},
            r"kernel='fused' is unknown; use 'auto', 'sdpa', 'online', 'flex', 'cudnn', 'efficient', 'reference', or a",
        ),
        ("sdpa", {"softcap": 30.0}, r"kernel='sdpa' cannot do this: .* has no softcap; use 'online' or 'reference'"),
        ("sdpa", {"bias": Slopes(2)}, r"has no bias; use 'online' or 'reference'"),
        ("sdpa", {"v_dim": 32}, r"wants equal query/key and value dims, not 64 and 32; use 'online'"),
        ("sdpa", {"device_type": "cuda"}, r"takes fp16 and bf16, not torch.float32; use 'online' or 'flex' or 'efficient'"),
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
