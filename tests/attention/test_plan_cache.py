"""Plans are made once per shape, mask and mesh, and keep neither models nor meshes alive."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.attention import plan_cache
from longspan.attention.api import AttentionSpec, attend, plan_attention
from longspan.attention.plan import AttentionPlan, ExchangePlan, HeadChunk, Hop, TensorGroup, TileBias
from longspan.attention.ulysses import heads_to_tokens, tokens_to_heads
from longspan.batch.shard import shard_batch
from longspan.distributed.mesh import ParallelMesh
from longspan.errors import LayoutError
from longspan.kernels.online import Online
from longspan.masks.constructors import Causal, Documents, Full, Mask, Window
from longspan.memory.options import MemoryOptions
from longspan.models.decoder import Decoder
from longspan.models.decoder_config import DecoderConfig
from longspan.parallelize import parallelize
from tests.helpers.ranks import Ranks

PLANS: tuple[type, ...] = (AttentionPlan, HeadChunk, Hop, ExchangePlan, TensorGroup)


class Zero:
    """A bias of zeros, of one parameter."""

    def __init__(self) -> None:
        self.parameters = (torch.zeros(1),)

    def __call__(self, heads: range, q: Tensor, k: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        return parameters[0].expand(len(heads), len(q), len(k))


def constructed(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> list[str]:
    """The names of the plan classes that are instantiated while ``work`` runs."""
    names: list[str] = []
    with monkeypatch.context() as patch:
        for kind in PLANS:

            def count(self: Any, *args: Any, _init: Any = kind.__init__, _name: str = kind.__name__, **kwargs: Any) -> None:
                names.append(_name)
                _init(self, *args, **kwargs)

            patch.setattr(kind, "__init__", count)
        work()
    return names


def test_no_plan_is_made_after_the_first_step(pool: Callable[[int], Ranks]) -> None:
    for degrees in ((2, 1), (1, 2), (2, 2)):
        pool(degrees[0] * degrees[1]).run(every_plan_is_made_once, *degrees)


def every_plan_is_made_once(ulysses: int, ring: int) -> None:
    mesh = ParallelMesh(ulysses, ring)
    torch.manual_seed(0)
    model = parallelize(Decoder(DecoderConfig(8, 3, 16, 4, 2, 4, ffn=16)), mesh, memory=MemoryOptions(recompute="selective"))
    q, k = torch.randn(1, 4, 4, 4, requires_grad=True), torch.randn(1, 4, 2, 4)
    ids, bias, kernel = torch.arange(12)[None] % 8, Zero(), Online()

    def step() -> None:
        model(**shard_batch({"input_ids": ids, "labels": ids}, mesh)).loss.backward()
        for mask in (Causal(), Window(3), Documents((4 * ulysses * ring - 3, 3))):
            attend(q, k, k, mask=mask, mesh=mesh).sum().backward()
        attend(q, k, k, mask=Causal(), mesh=mesh, head_chunks=2).sum().backward()
        attend(q, k, k, mask=Causal(), mesh=mesh, bias=bias).sum().backward()
        attend(q, k, k, mask=Causal(), mesh=mesh, bias=Zero(), kernel=kernel).sum().backward()
        heads_to_tokens(tokens_to_heads(q, mesh), mesh, 4).sum().backward()

    with pytest.MonkeyPatch.context() as monkeypatch:
        assert set(constructed(monkeypatch, step)) >= {"AttentionPlan", "HeadChunk", "Hop"}
        assert constructed(monkeypatch, step) == []


def spec(mask: Mask, **fields: Any) -> AttentionSpec:
    shape = torch.Size((1, 8, 4, 4))
    each = {"q_shape": shape, "k_shape": shape, "v_shape": shape, "dtype": torch.float32, "device_type": "cpu"}
    return AttentionSpec(**{**each, "mask": mask, **fields})


def test_equal_specs_have_one_plan_and_others_have_their_own() -> None:
    plan = plan_attention(spec(Causal()))
    assert plan_attention(spec(Causal())) is plan
    others = [
        spec(Full()), spec(Causal(), softcap=2.0), spec(Causal(), scale=1.0), spec(Causal(), kernel="online"),
        spec(Causal(), head_chunks=2), spec(Causal(), dtype=torch.float64), spec(Causal(), q_shape=torch.Size((1, 9, 4, 4))),
    ]  # fmt: skip
    plans = [plan, *(plan_attention(other) for other in others)]
    assert len(set(map(id, plans))) == len(plans)


def test_the_positions_of_a_bias_are_formed_where_the_queries_are() -> None:
    """A copy from the host for each tile would make the host wait for the device."""
    plan = plan_attention(spec(Causal(), bias=Zero(), kernel=Online()))
    bias = plan.bias_of(plan.chunks[0], plan.hops[0].arriving, (), torch.device("meta"))
    assert bias is not None
    tile = bias(slice(0, 1))
    assert isinstance(tile, TileBias)
    assert {tile.q_positions.device.type, tile.k_positions.device.type} == {"meta"}


def test_a_kernel_and_a_bias_are_bound_and_not_kept() -> None:
    bias, kernel = Zero(), Online()
    plan = plan_attention(spec(Causal(), bias=bias, kernel=kernel))
    assert plan.bias is bias
    assert plan.kernel is kernel
    assert plan_attention(spec(Causal(), kernel=kernel)).bias is None
    dead = [weakref.ref(bias), weakref.ref(kernel)]
    del bias, kernel, plan
    gc.collect()
    assert [reference() for reference in dead] == [None, None]


def test_plans_are_freed_with_their_mesh(pool: Callable[[int], Ranks]) -> None:
    assert pool(2).run(mesh_is_freed) == [True, True]


def mesh_is_freed() -> bool:
    mesh = ParallelMesh(2)
    q = torch.randn(1, 4, 2, 4, requires_grad=True)
    attend(q, q, q, mask=Causal(), mesh=mesh).sum().backward()
    reference = weakref.ref(mesh)
    assert mesh.plans
    del mesh
    gc.collect()
    return reference() is None


def test_the_cache_is_bounded_and_forgets_what_was_used_least_recently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cache, "PLANS", 3)
    monkeypatch.setattr(plan_cache, "_ONE_DEVICE", {})
    masks = [Window(n) for n in range(5)]
    first = plan_attention(spec(masks[0]))
    for mask in masks:
        plan_attention(spec(mask))
        assert plan_attention(spec(masks[0])) is first
    assert [key.mask for key in plan_cache._ONE_DEVICE] == [masks[3], masks[4], masks[0]]  # type: ignore[attr-defined]


def test_an_error_is_raised_each_time() -> None:
    for _ in range(2):
        with pytest.raises(LayoutError, match="head_chunks=5 cannot cut the 4 query heads"):
            plan_attention(spec(Causal(), head_chunks=5))
