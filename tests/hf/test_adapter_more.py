"""Law 1 for what people put on and around Hugging Face models: adapters, balance losses, compilers, half precision."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

from longspan import (
    BatchError,
    KernelError,
    ModelError,
    ParallelMesh,
    cross_entropy,
    parallel_state,
    parallelize,
    shard_batch,
    unparallelize,
    unshard,
)
from longspan.attention.api import refuse_kernel
from longspan.distributed.collectives import all_reduce_sum
from longspan.distributed.mesh import MeshCoordinate
from longspan.hf.registry_kernel import refuse_name
from longspan.masks.constructors import Causal, SinkTokens, Window
from tests.helpers.options import keywords
from tests.helpers.ranks import Ranks
from tests.hf.test_adapter import (
    BASE,
    KINDS,
    assert_gradients,
    batches,
    build,
    forward_alone,
    forward_cut,
    in_place,
    mesh_of,
    targets,
)


@pytest.fixture(autouse=True)
def _leave_no_group_behind() -> Iterator[None]:
    """Ranks that are forked later would inherit the world of one that a ``ParallelMesh()`` makes here."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- adapters


def adapted(config: Any) -> Any:
    """A tiny llama in peft's wrapper, its base frozen and its new adapters not at zero."""
    torch.manual_seed(1)
    model = peft.get_peft_model(build("llama"), config)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def lora(**more: Any) -> Any:
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **more)


@pytest.mark.parametrize("zero", [0, 3])
def test_lora_on_a_frozen_base_is_one_device(zero: int, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(adapters, zero)


def adapters(zero: int) -> None:
    """Two steps of AdamW on the adapters and a head that is trained whole, then back to one device."""
    mesh, whole = mesh_of(2, 1), batches("odd length", False)
    reference = adapted(lora(modules_to_save=["lm_head"]))
    model = parallelize(deepcopy(reference), mesh, zero=zero)
    trained = [[p for p in m.parameters() if p.requires_grad] for m in (reference, model)]
    optimizers = [torch.optim.AdamW(parameters, lr=1e-2) for parameters in trained]
    for _ in range(2):
        expected, _ = forward_alone(reference, whole, False)
        expected.backward()
        part = shard_batch(whole, mesh)
        found = model(**part).loss
        found.backward()
        assert found.item() == pytest.approx(expected.item(), rel=1e-9)
        assert_gradients(model, reference, 1e-9)
        assert {name for name, p in model.named_parameters() if p.grad is not None} == {
            name for name, p in reference.named_parameters() if p.requires_grad
        }
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if zero == 0:
        alone, _ = forward_alone(unparallelize(model), whole, False)
        assert alone.item() == pytest.approx(forward_alone(reference, whole, False)[0].item(), rel=1e-9)
        assert model.config._attn_implementation == model.get_base_model().config._attn_implementation != "longspan"


def test_a_new_adapter_whose_zeros_hide_what_it_mixes_is_refused() -> None:
    model = peft.get_peft_model(build("llama"), lora())
    mixing = model.base_model.model.model.layers[1].self_attn.v_proj.lora_A["default"]
    mixing.register_forward_hook(lambda module, args, output: output.cumsum(1))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ModelError, match=r"layers.1.self_attn.v_proj.lora_A.default' mixes tokens"):
        parallelize(model, ParallelMesh())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "puts learned tokens before the sequence"),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "puts learned tokens before the sequence"),
        (lora(alora_invocation_tokens=[5, 6]), "looks for in the whole sequence"),
    ],
)
def test_adapters_that_mean_the_whole_sequence_are_refused(config: Any, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        parallelize(peft.get_peft_model(build("llama"), config), ParallelMesh())


# ---- the balance loss of experts


BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


@pytest.mark.parametrize(
    ("name", "batch", "ulysses", "ring", "zero"),
    [
        ("mixtral", "odd length", 2, 1, 3),
        ("qwen3_moe", "left padding", 1, 2, 0),
        ("gpt_oss", "right padding", 2, 1, 0),
        ("mixtral", "left padding", 1, 1, 0),
    ],
)
def test_the_balance_loss_is_that_of_every_token(
    name: str, batch: str, ulysses: int, ring: int, zero: int, pool: Callable[[int], Ranks]
) -> None:
    """On one mesh of each kind; where the ranks are replicas, each has one of the two rows."""
    pool(2).run(balance, name, batch, ulysses, ring, zero)


def balance(name: str, batch: str, ulysses: int, ring: int, zero: int, empty: bool = False) -> None:
    mesh, reference, whole = mesh_of(ulysses, ring), build(name, **BALANCED), batches(batch, False)
    output = reference(**{key: value for key, value in whole.items() if key != "labels"}, use_cache=False)
    expected = cross_entropy(output.logits, targets(whole["labels"], False)) + 0.5 * output.aux_loss
    expected.backward()
    model = parallelize(build(name, **BALANCED), mesh, zero=zero)
    rows = slice(mesh.coordinate.data_rank, mesh.coordinate.data_rank + 1) if mesh.coordinate.data > 1 else slice(0, 2)
    if empty:
        rows = slice(0, 2) if mesh.coordinate.data_rank == 0 else slice(0, 0)
    found = model(**shard_batch({key: value[rows] for key, value in whole.items()}, mesh))
    found.loss.backward()
    assert found.aux_loss.item() == pytest.approx(output.aux_loss.item(), rel=1e-6)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert {len(logits) for logits in found.router_logits} == {found.logits.shape[:2].numel() or whole["input_ids"].shape[1]}
    assert_gradients(model, reference, KINDS[name].tolerance)


def test_a_replica_without_a_row_has_no_routes(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(balance, "qwen3_moe", "right padding", 1, 1, 0, True)


def test_a_balance_loss_of_anything_else_is_refused() -> None:
    model = build("mixtral", **BALANCED)
    model.register_forward_hook(lambda module, args, out: out | {"aux_loss": out.logits.mean()} if "aux_loss" in out else out)
    with pytest.raises(ModelError, match="the balance loss of MixtralForCausalLM is not its own function of all tokens"):
        parallelize(model, ParallelMesh())
    mesh = ParallelMesh()
    model = parallelize(build("mixtral"), mesh)
    with pytest.raises(ModelError, match=r"set config\.output_router_logits before parallelize"):
        model(**shard_batch(batches("even", False), mesh), output_router_logits=True)


# ---- half precision with a scaler, quantised layers


@pytest.mark.parametrize("zero", [0, 3])
def test_all_ranks_skip_a_step_whose_gradient_is_infinite_on_one(zero: int, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(scaled, zero)


def scaled(zero: int) -> None:
    """fp16 autocast: two steps as on one device, then one with an infinite gradient, which rank 1 alone may hold."""
    mesh, whole, reference = mesh_of(2, 1), batches("even", False), build("llama").float()
    model = parallelize(deepcopy(reference), mesh, zero=zero)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (reference, model)]
    for step in range(3):
        before = [local(p).clone() for p in model.parameters()]
        with torch.autocast("cpu", torch.float16):
            losses = [forward_alone(reference, whole, False)[0], model(**shard_batch(whole, mesh)).loss]
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=2e-3)
        for scaler, loss, optimizer in zip(scalers, losses, optimizers):
            scaler.scale(loss).backward()
            if step == 2:
                spoiled = local(optimizer.param_groups[0]["params"][-1].grad)
                spoiled.fill_(float("inf") if scaler is scalers[0] or zero == 0 or dist.get_rank() == 1 else 0.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scalers[0].get_scale() == scalers[1].get_scale() == (2.0**9 if step == 2 else 2.0**10)
        assert all(torch.equal(local(p), was) for p, was in zip(model.parameters(), before)) is (step == 2)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Int8Linear(nn.Module):
    """A frozen linear layer of 8-bit weights, as quantised bases have them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale)


def quantised() -> Any:
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = Int8Linear(layer.mlp.down_proj)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def test_adapters_on_a_quantised_base_are_one_device(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(adapters_on_quantised)
    with pytest.raises(ModelError, match=r"zero=3 would shard '.*layers.0.mlp.down_proj.weight' of torch.int8"):
        parallelize(quantised(), ParallelMesh(), zero=3)


def adapters_on_quantised() -> None:
    mesh, whole, reference = mesh_of(2, 1), batches("odd length", False), quantised()
    model = parallelize(deepcopy(reference), mesh)
    forward_alone(reference, whole, False)[0].backward()
    model(**shard_batch(whole, mesh)).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    for mine, one in zip(trained, (p for p in reference.parameters() if p.requires_grad)):
        torch.testing.assert_close(mine.grad, one.grad, rtol=1e-9, atol=1e-12)


# ---- positions of text, height and width


def test_three_rows_of_positions_are_one_device(pool: Callable[[int], Ranks]) -> None:
    """[3, batch, tokens], as qwen2_vl has them; on a ring, in zigzag, and with a replica that has no row."""
    pool(2).run(three_rows, 1, 2, False)
    pool(2).run(three_rows, 1, 1, True)


def three_rows(ulysses: int, ring: int, replicas: bool) -> None:
    mesh, reference = mesh_of(ulysses, ring), vision_text()
    model = parallelize(deepcopy(reference), mesh)
    drawn = torch.Generator().manual_seed(3)
    ids, positions = torch.randint(3, 97, (2, 13), generator=drawn), torch.randint(0, 13, (3, 2, 13), generator=drawn)
    weights = torch.randn(2, 13, 32, generator=drawn, dtype=torch.float64)
    out = reference(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    (out * weights).sum().backward()
    rows = slice(0, 2) if not replicas or mesh.coordinate.data_rank == 0 else slice(0, 0)
    part = shard_batch({"input_ids": ids[rows], "position_ids": positions[:, rows]}, mesh)
    mine = unshard(model(**part).last_hidden_state, mesh, tokens=13)
    torch.testing.assert_close(mine, out[rows], rtol=1e-10, atol=1e-10)
    (all_reduce_sum((mine * weights[rows]).sum(), mesh.loss_group) / (1 if replicas else mesh.world_group.size())).backward()
    assert_gradients(model, reference, 1e-10)


def vision_text() -> Any:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = Qwen2VLTextConfig(**{**BASE, "rope_parameters": rope})
    return Qwen2VLTextModel(config).double().train()


def test_a_row_of_positions_that_only_some_models_take_for_documents_is_refused() -> None:
    positions = torch.cat([torch.arange(5), torch.arange(8)]).expand(4, 1, 13)
    with pytest.raises(BatchError, match=r"begin anew in their first row.*mask=Documents"):
        shard_batch({"input_ids": torch.ones(1, 13, dtype=torch.long), "position_ids": positions}, ParallelMesh())


# ---- another kernel: longspan's by name, a function, an attention of Transformers' registry


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


def test_a_registered_attention_is_told_all_by_keywords_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes no mask, as flash attention: it is called once a document, and refuses what no keyword says."""
    calls: list[tuple[int, dict[str, Any]]] = []

    def like_flash(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, **said: Any) -> tuple[Tensor, None]:
        calls.append((q.shape[2], {name: said[name] for name in ("is_causal", "sliding_window") if name in said}))
        return v.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "like_flash", like_flash)
    mesh, ids = ParallelMesh(), torch.arange(3, 27)[None]
    model = parallelize(build("mistral", num_hidden_layers=1), mesh, kernel="hf:like_flash")
    positions = torch.cat([torch.arange(4), torch.arange(20)])[None]
    model(**shard_batch({"input_ids": ids, "position_ids": positions}, mesh))
    assert calls == [(4, {"is_causal": True}), (20, {"is_causal": True, "sliding_window": 5})]
    with pytest.raises(KernelError, match=r"takes no mask and cannot express the mask of this step in MistralAttention"):
        model(**shard_batch({"input_ids": ids}, mesh, mask=(SinkTokens(2) & Causal()) | Window(2)))
