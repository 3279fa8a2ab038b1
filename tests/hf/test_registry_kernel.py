"""Another kernel in a Hugging Face model: longspan's by name, a function, an attention of Transformers' registry."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from longspan import KernelError, ParallelMesh, parallel_state, parallelize, shard_batch
from longspan.attention.api import refuse_kernel
from longspan.distributed.coordinate import MeshCoordinate
from longspan.hf.registry_kernel import refuse_name
from longspan.masks.constructors import Causal, SinkTokens, Window
from tests.helpers.hf_models import KINDS, assert_gradients, batches, build, forward_alone, forward_cut, in_place
from tests.helpers.options import keywords
from tests.helpers.ranks import Ranks, mesh_of


def by_hand(q: Tensor, k: Tensor, v: Tensor, *, bands: Any, scale: float) -> Tensor:
    """A kernel of the user's own: [rows, heads, dim], with the dense mask of the bands."""
    place = torch.arange(len(q))
    apart = place - place[:, None]
    seen = torch.zeros(len(q), len(q), dtype=torch.bool)
    for q_start, q_stop, k_start, k_stop, lo, hi in bands:
        rows, keys = ((place >= start) & (place < stop) for start, stop in ((q_start, q_stop), (k_start, k_stop)))
        seen |= rows[:, None] & keys & (apart >= lo) & (apart <= hi)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True).transpose(0, 1)


@pytest.mark.parametrize(
    ("name", "batch", "kernel", "tools"),
    [
        ("llama", "even", "hf:sdpa", {}),
        ("llama", "packed", "hf:eager", {}),
        ("llama", "even", by_hand, {}),
        ("llama", "odd length", "online", {}),
        ("mistral", "left padding", "hf:sdpa", {"recompute": "selective"}),
        ("mistral", "one key/value head", "hf:eager", {}),
        ("gemma2", "right padding", "hf:eager", {}),
        ("gpt_oss", "left padding", "hf:eager", {}),
        ("gpt_oss", "packed", "hf:eager", {"recompute": "selective", "head_chunks": 2, "zero": 3}),
        ("modernbert", "odd length", "hf:eager", {}),
    ],
)
def test_another_kernel_is_one_device(
    name: str, batch: str, kernel: Any, tools: dict[str, Any], pool: Callable[[int], Ranks]
) -> None:
    pool(2).run(with_kernel, name, batch, kernel, tools)


def with_kernel(name: str, batch: str, kernel: Any, tools: dict[str, Any]) -> None:
    mesh, reference = mesh_of(2, 1), build(name, **({"num_key_value_heads": 1} if batch == "one key/value head" else {}))
    whole, encoder = batches(batch, in_place(reference)), in_place(reference)
    model = parallelize(deepcopy(reference), mesh, kernel=kernel, **keywords(tools))
    expected, logits = forward_alone(reference, whole, encoder)
    found, mine = forward_cut(model, whole, encoder, mesh, True)
    expected.backward()
    found.backward()
    real = whole.get("attention_mask", torch.ones_like(whole["input_ids"])).bool()
    tolerance = max(KINDS[name].tolerance, 1e-5 if kernel == "hf:eager" else 0)  # its softmax is fp32
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)
    assert (mine - logits)[real].abs().max() <= tolerance * logits[real].abs().max()
    assert_gradients(model, reference, tolerance)


@pytest.mark.parametrize(
    ("name", "kernel", "text"),
    [
        ("llama", "fused", r"kernel='fused' is unknown; use 'auto', 'sdpa'"),
        ("llama", "hf:fused", r"kernel='hf:fused' is no attention of .* use 'hf:eager', .*'hf:sdpa'"),
        ("llama", "hf:flex_attention", r"no attention of Transformers' registry that longspan can call; use .*'flex'"),
        ("llama", "hf:longspan", "no attention of Transformers' registry"),
        ("gpt_oss", "hf:sdpa", "kernel='hf:sdpa' cannot be used by GptOssForCausalLM"),
    ],
)
def test_a_kernel_that_cannot_be_is_refused(name: str, kernel: str, text: str) -> None:
    model = build(name)
    with pytest.raises(KernelError, match=text):
        parallelize(model, ParallelMesh(), kernel=kernel)
    assert model.config._attn_implementation != "longspan"
    assert parallel_state(model) is None
    with pytest.raises(KernelError, match="kernel='hf:eager' returns only its output, which cannot carry a ring"):
        refuse_name("hf:eager", model, MeshCoordinate(ring=2))
    with pytest.raises(KernelError, match="kernel 'by_hand' returns only its output, which cannot carry ring"):
        refuse_kernel(by_hand, MeshCoordinate(ring=2))


def test_a_registered_attention_gets_all_keywords_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes no mask, as flash attention: it is called once a document, and refuses what no keyword says."""
    calls: list[tuple[int, dict[str, Any]]] = []

    def like_flash(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, **keywords: Any) -> tuple[Tensor, None]:
        calls.append((q.shape[2], {name: keywords[name] for name in ("is_causal", "sliding_window") if name in keywords}))
        return v.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "like_flash", like_flash)
    mesh, ids = ParallelMesh(), torch.arange(3, 27)[None]
    model = parallelize(build("mistral", num_hidden_layers=1), mesh, kernel="hf:like_flash")
    positions = torch.cat([torch.arange(4), torch.arange(20)])[None]
    model(**shard_batch({"input_ids": ids, "position_ids": positions}, mesh))
    assert calls == [(4, {"is_causal": True}), (20, {"is_causal": True, "sliding_window": 5})]
    with pytest.raises(KernelError, match=r"takes no mask and cannot express the mask of this step in MistralAttention"):
        model(**shard_batch({"input_ids": ids}, mesh, mask=(SinkTokens(2) & Causal()) | Window(2)))
