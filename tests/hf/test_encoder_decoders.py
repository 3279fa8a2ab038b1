"""Law 1 for encoder-decoders of Transformers: two rows of tokens, each cut by its own length, against one device; or a refusal.

The reference is the untouched model, its own attention and its own loss. All in fp64, but those whose own attention or norms
compute in fp32: T5Gemma and the T5 family.
"""

import re
from collections.abc import Callable
from copy import deepcopy
from types import MethodType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor

from longspan import (
    AutoMemory,
    BatchError,
    LongspanError,
    MemoryOptions,
    ModelError,
    ParallelMesh,
    parallel_state,
    parallelize,
    shard_batch,
    shift_right,
    unparallelize,
    unshard,
)
from longspan.batch.shard import IGNORE, shard_local
from longspan.distributed.mesh import MeshCoordinate
from longspan.masks.constructors import Causal
from tests.helpers.options import keywords
from tests.helpers.ranks import Ranks, mesh_of

transformers.logging.set_verbosity_error()

COMMON: dict[str, Any] = {
    "vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "dropout": 0.0,
    "attention_dropout": 0.0, "activation_dropout": 0.0, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    "decoder_start_token_id": 2, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
}  # fmt: skip
GEMMA: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "dropout_rate": 0.0, "attention_dropout": 0.0,
    "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "max_position_embeddings": 64,
}  # fmt: skip
TINY_T5: dict[str, Any] = {
    "vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
    "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}  # fmt: skip
KINDS = {
    "bart": "Bart", "mbart": "MBart", "pegasus": "Pegasus", "marian": "Marian", "plbart": "PLBart", "t5gemma": "T5Gemma",
    "t5": "T5", "mt5": "MT5", "umt5": "UMT5",
}  # fmt: skip
FP32 = ("t5gemma", "t5", "mt5", "umt5")
BATCHES = ["even", "odd lengths", "few targets", "left padding", "right padding", "a rank without labels", "packed targets"]
LAYOUTS = [(2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]


def build(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    if name == "t5gemma":
        sides = {side: transformers.T5GemmaModuleConfig(**GEMMA) for side in ("encoder", "decoder")}
        more = {"attn_implementation": "eager"} | more  # before 5.21 the default drops the softcap on one device
        config = transformers.T5GemmaConfig(**sides, vocab_size=97, **more)
        config.pad_token_id, config.decoder_start_token_id = 1, 2
        model = transformers.T5GemmaForConditionalGeneration(config)
    else:
        config = getattr(transformers, f"{KINDS[name]}Config")(**(TINY_T5 if "t5" in name else COMMON) | more)
        kind = "MarianMTModel" if name == "marian" else f"{KINDS[name]}ForConditionalGeneration"
        model = getattr(transformers, kind)(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.to(torch.float32 if name in FP32 else torch.float64).train()


def tolerance_of(name: str) -> float:
    return 1e-5 if name in FP32 else 1e-10


def batches(name: str, batch: str) -> dict[str, Tensor]:
    """What the user has, for two rows: the same for one device and, cut, for the ranks."""
    tokens, targets = {"odd lengths": (23, 17), "few targets": (24, 5)}.get(batch, (24, 16))
    own = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(4, 97, (2, count), generator=own) for count in (tokens, targets))
    masks = {"attention_mask": torch.ones_like(ids), "decoder_attention_mask": torch.ones_like(labels)}
    if batch == "left padding":
        masks["attention_mask"][0, :5] = 0
    if batch == "right padding":
        masks["attention_mask"][1, -7:] = 0
        masks["decoder_attention_mask"][0, -6:] = 0
        labels[0, -6:] = IGNORE
    if batch == "a rank without labels":
        labels[:, targets // 2 :] = IGNORE
    whole = {"input_ids": ids, "labels": labels, "decoder_input_ids": shift_right(labels, 2, 4)}
    if batch == "packed targets":
        whole["decoder_position_ids"] = torch.stack([torch.arange(targets) % 7, torch.arange(targets)])
    return whole | (masks if "padding" in batch or name == "t5gemma" else {})


def alone(model: Any, whole: dict[str, Tensor]) -> Any:
    return model(**whole, use_cache=False)


def compare(name: str, batch: str, ulysses: int, ring: int, zero: int = 0, steps: int = 0, **tools: Any) -> None:
    mesh = mesh_of(ulysses, ring)
    reference = build(name)
    model, whole, tolerance = deepcopy(reference), batches(name, batch), tolerance_of(name)
    parallelize(model, mesh, **keywords({"zero": zero} | tools))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (reference, model)]
    for step in range(1 + steps):
        expected = alone(reference, whole)
        expected.loss.backward()
        part = shard_batch(whole, mesh, shift=False)
        found = model(**part)
        found.loss.backward()
        loose = tolerance if step == 0 else max(tolerance, 1e-6)  # a true gradient of 0 has the sign of rounding
        assert abs(found.loss.item() - expected.loss.item()) <= loose * expected.loss.item(), f"loss of step {step}"
        if step == 0:
            assert_outputs(found, expected, whole, part["longspan"], mesh, tolerance)
            assert_gradients(model, reference, tolerance)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if zero == 0:
        unparallelize(model)
        assert not [key for key in vars(model) if "longspan" in key or key in ("_loss_function", "forward")]
        assert not [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks]
        assert torch.isfinite(alone(model, whole).loss)


def assert_outputs(
    found: Any, expected: Any, whole: dict[str, Tensor], step: Any, mesh: ParallelMesh, tolerance: float
) -> None:
    for output, row, mask in (
        ("logits", step.target, "decoder_attention_mask"), ("encoder_last_hidden_state", step, "attention_mask")
    ):  # fmt: skip
        mine, theirs = unshard(found[output], mesh, tokens=row.tokens), expected[output]
        real = whole.get(mask, torch.ones(theirs.shape[:2])).bool()
        assert (mine - theirs)[real].abs().max() <= tolerance * theirs[real].abs().max(), output


def assert_gradients(model: Any, reference: Any, tolerance: float) -> None:
    total = torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None]).norm().item()
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters()):
        if mine.requires_grad:
            got = mine.grad.full_tensor() if isinstance(mine.grad, DTensor) else mine.grad
            error = (got - theirs.grad).norm().item()
            assert error <= tolerance * max(theirs.grad.norm().item(), 1e-3 * total), f"{name} is off by {error:.1e}"


PAIRS = [(name, batch) for name in KINDS for batch in BATCHES if batch != "packed targets" or name == "t5gemma"]


SOME = [
    *[("t5gemma", batch) for batch in BATCHES],
    *[("bart", batch) for batch in ("even", "few targets", "right padding", "left padding")],
    *[("t5", batch) for batch in ("odd lengths", "a rank without labels", "right padding")],
    ("mbart", "odd lengths"), ("pegasus", "right padding"), ("marian", "odd lengths"), ("plbart", "right padding"),
    ("mt5", "even"), ("umt5", "right padding"),
]  # fmt: skip
"""Every batch with one model, some with one more of each way to count positions, one with each of their kin.

A batch's fault shows with any model of its way to count positions, a model's own fault with any batch; test-long has all pairs.
"""


@pytest.mark.parametrize(("name", "batch"), SOME)
def test_pairs_under_one_layout(name: str, batch: str, pool: Callable[[int], Ranks]) -> None:
    """Ulysses 2 for the even batch, with three steps of AdamW; for the others the layouts in turn."""
    turn = [(2, 1), (1, 2), (2, 2), (1, 2), (2, 1), (1, 4), (4, 1)]
    ulysses, ring = LAYOUTS[0] if batch == "even" else turn[SOME.index((name, batch)) % len(turn)]
    pool(ulysses * ring).run(compare, name, batch, ulysses, ring, 0, 3 if batch == "even" else 0)


@pytest.mark.long
@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize(("name", "batch"), PAIRS)
def test_every_pair_under_two_layouts(name: str, batch: str, turn: int, pool: Callable[[int], Ranks]) -> None:
    """Two of the five layouts each, so that every kind and every batch meets every layout."""
    ulysses, ring = LAYOUTS[(2 * PAIRS.index((name, batch)) + turn) % len(LAYOUTS)]
    pool(ulysses * ring).run(compare, name, batch, ulysses, ring, 0, 3)


LONG = pytest.mark.long  # t5gemma has windows and a softcap, t5 a bias; what bart adds to them are learned positions


@pytest.mark.parametrize("name", [pytest.param("bart", marks=LONG), "t5gemma", "t5"])
def test_sharded_parameters_and_every_tool(name: str, pool: Callable[[int], Ranks]) -> None:
    tools = {"recompute": "full", "tile_tokens": 4, "head_chunks": 2, "offload_activations": True}
    pool(2).run(compare_with, name, "right padding", tools)


def compare_with(name: str, batch: str, tools: dict[str, Any]) -> None:
    compare(name, batch, 2, 1, 3, 1, **tools)


@pytest.mark.parametrize("name", ["bart", pytest.param("t5", marks=LONG)])
def test_replicas_count_labels_together_and_one_without_a_row_joins(name: str, pool: Callable[[int], Ranks]) -> None:
    pool(4).run(replicas, name)


def replicas(name: str) -> None:
    """Two micro-batches, the second of one row: none is left for the second replica."""
    mesh, reference = mesh_of(2), build(name)
    model = parallelize(deepcopy(reference), mesh)
    whole, tolerance = batches(name, "right padding"), tolerance_of(name)
    first = {key: value[[mesh.coordinate.data_rank]] for key, value in whole.items()}
    second = {key: value[:1] if mesh.coordinate.data_rank == 0 else value[:0] for key, value in whole.items()}
    num_labels = int((whole["labels"] != IGNORE).sum()) + int((whole["labels"][:1] != IGNORE).sum())
    expected = torch.zeros(())
    for batch in (whole, {key: value[:1] for key, value in whole.items()}):
        loss = alone(reference, batch).loss * int((batch["labels"] != IGNORE).sum()) / num_labels
        loss.backward()
        expected = expected + loss.detach()
    found = torch.zeros(())
    for part in shard_batch([first, second], mesh, shift=False):
        loss = model(**part).loss
        loss.backward()
        found = found + loss.detach()
    assert abs(found - expected) <= tolerance * expected
    assert_gradients(model, reference, tolerance)


def test_the_loss_of_a_model_that_calls_its_own_can_be_formed_in_tiles(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(without_logits)


def without_logits() -> None:
    mesh, reference = mesh_of(2), build("t5gemma")
    whole = batches("t5gemma", "odd lengths")
    model = parallelize(deepcopy(reference), mesh, memory=MemoryOptions(chunked_loss=True))
    expected = alone(reference, whole).loss
    expected.backward()
    output = model(**shard_batch(whole, mesh, shift=False))
    output.loss.backward()
    assert output.logits is None
    assert abs(output.loss.item() - expected.item()) <= 1e-5 * expected.item()
    assert_gradients(model, reference, 1e-5)


def test_a_t5_encoder_alone(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(encoder_alone)


def encoder_alone() -> None:
    mesh = mesh_of(2)
    reference = transformers.T5EncoderModel(transformers.T5Config(**TINY_T5)).train()
    model = parallelize(deepcopy(reference), mesh)
    ids = torch.randint(4, 97, (2, 23), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0
    weight = torch.randn(2, 23, 32, generator=torch.Generator().manual_seed(2)) * mask.unsqueeze(2)
    (reference(input_ids=ids, attention_mask=mask).last_hidden_state * weight).sum().backward()
    found = model(**shard_batch({"input_ids": ids, "attention_mask": mask}, mesh)).last_hidden_state
    (unshard(found, mesh, tokens=23) * weight).sum().backward()
    assert_gradients(model, reference, 1e-5)


# ---- refusals


def refused(model: Any) -> str:
    with pytest.raises(ModelError) as error:
        parallelize(model, mesh_of())
    return str(error.value)


def test_a_bias_that_is_not_of_distances_is_refused(pool: Callable[[int], Ranks]) -> None:
    (said,) = pool(1).run(refused_places)
    assert "adds a bias that is not of distances alone" in said


def refused_places() -> str:
    """Of a T5 whose bias knows where a key stands, not only how far away."""
    model = build("t5")
    for module in model.modules():
        if getattr(module, "has_relative_attention_bias", False):
            module.compute_bias = MethodType(compute_bias_of_places, module)
    return refused(model)


def compute_bias_of_places(
    self: Any, query_length: int, key_length: int, device: Any = None, past_seen_tokens: int = 0
) -> Tensor:
    own = type(self).compute_bias(self, query_length, key_length, device, past_seen_tokens)
    return own + torch.arange(key_length).to(own)


def test_tables_that_count_ids_are_refused(pool: Callable[[int], Ranks]) -> None:
    (said,) = pool(1).run(refused, transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(**COMMON)))
    assert "counts positions in its own way" in said or "does not count its positions" in said


def test_layers_that_are_dropped_at_random_are_refused(pool: Callable[[int], Ranks]) -> None:
    (said,) = pool(1).run(refused, build("bart", decoder_layerdrop=0.1))
    assert "config.decoder_layerdrop drops layers at random, other ones on every rank; set it to 0" in said


CALLS = {
    "no decoder_input_ids": r"had no decoder_input_ids; make them before the cut, by model.prepare_decoder",
    "decoder_input_ids for a decoder": r"LlamaForCausalLM has no decoder apart; leave them out",
    "no mask for a model that hides padding": r"hides the padding token .* attention_mask and decoder_attention_mask",
    "more positions than the table": r"the step has positions up to 64, and the table of Bart\w+ has 64 of them",
    "more positions than gpt2's table": r"positions up to 16, and the table of GPT2LMHeadModel has 16 of them",
    "encoder_outputs": r"encoder_outputs= means the whole sequence",
    "what a layer would add": r"BartAttention hands its attention score_bias of shape \[1, 4\], counted over",
    "a token that only the encoder knows": r"holds token or label 80, and T5GemmaForConditionalGeneration knows 0 to 59",
    "positions that one device ignores": r"counts its positions itself and ignores decoder_position_ids; give shard_batch none",
    "a kernel of the registry": r"kernel='hf:sdpa' attends within one row of tokens",
    "AutoMemory": r"AutoMemory knows models of one row of tokens, and BartForConditionalGeneration has two",
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_that_are_refused_on_every_rank(call: str, pool: Callable[[int], Ranks]) -> None:
    for said in pool(2).run(refused_call, call):
        assert re.search(CALLS[call], said), said


def refused_call(call: str) -> str:
    mesh = mesh_of(2)
    name = "t5gemma" if "hides" in call or "only the encoder" in call else "bart"
    whole, model, shift = batches(name, "even"), build(name), False
    if "gpt2" in call or "for a decoder" in call:
        ids = torch.zeros(1, 17, dtype=torch.long)
        whole = {"input_ids": ids} | ({"decoder_input_ids": ids} if "for a decoder" in call else {})
        tiny: Any = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 97}
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 97}
        model = (
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
            if "for a decoder" in call
            else transformers.GPT2LMHeadModel(transformers.GPT2Config(**tiny))
        )
    if "no decoder" in call:
        whole = {"input_ids": whole["input_ids"], "labels": whole["input_ids"]}
    if "hides" in call:
        whole = {name: value for name, value in whole.items() if name != "decoder_attention_mask"}
    if call == "more positions than the table":
        whole["input_ids"] = torch.full((2, 65), 5)
    if "only the encoder" in call:
        model.model.decoder.embed_tokens = torch.nn.Embedding(60, 32)
        whole["decoder_input_ids"].clamp_(max=50)
        whole["labels"].clamp_(max=50)
        whole["input_ids"][0, 0], whole["decoder_input_ids"][1, -1] = 90, 80
    if "ignores" in call:
        whole["decoder_position_ids"] = torch.arange(16).expand(2, 16)
    given = {"a kernel of the registry": {"kernel": "hf:sdpa"}, "AutoMemory": AUTO}.get(call, {})
    beside = {"encoder_outputs": (torch.zeros(1),), "what a layer would add": torch.zeros(1, 4)}
    more = {"score_bias" if "add" in call else call: beside[call]} if call in beside else {}
    try:
        parallelize(model, mesh, **given)
        model(**shard_batch(whole, mesh, shift=shift), **more)
    except LongspanError as error:
        return str(error)
    return "nothing was refused"


AUTO = {"memory": AutoMemory(budget_gib=1.0, tokens=1024)}


IDS, FEW = torch.full((2, 8), 5), torch.full((2, 4), 5)
PAIR = {"input_ids": IDS, "decoder_input_ids": FEW, "labels": FEW}
EMPTY = torch.ones_like(IDS).index_fill(0, torch.tensor([1]), 0)


@pytest.mark.parametrize(
    ("batch", "keywords", "text"),
    [
        (PAIR, {"shift": True}, r"labels of an encoder-decoder stand where they are predicted.*shift=False"),
        (PAIR, {"mask": Causal()}, r"mask= says who may look at whom in one row of tokens, and an encoder-decoder has two"),
        (PAIR, {"dims": {"labels": 3}}, r"of the decoder's tensors .*'labels' of shape"),
        (PAIR | {"decoder_input_ids": FEW[:1], "labels": FEW[:1]}, {}, r"the encoder was given 2 rows and the decoder 1"),
        (PAIR | {"attention_mask": EMPTY}, {}, r"row 1 is padding alone.* set them to -100"),
        (PAIR | {"decoder_attention_mask": torch.ones(2, 5)}, {}, r"of the decoder's tensors .*must be \[2, 4\]"),
        (PAIR | {"decoder_grid": FEW}, {}, r"of the decoder's tensors .*tensor 'grid' of shape \[2, 4\] is unknown"),
        (PAIR | {"labels": IDS}, {}, r"labels of shape \[2, 8\] do not stand beside decoder_input_ids of \[2, 4\]"),
    ],
)
def test_batches_that_are_refused(batch: Any, keywords: Any, text: str) -> None:
    with pytest.raises(BatchError, match=text):
        shard_local(batch, MeshCoordinate(ulysses=2), **{"shift": False} | keywords)


@pytest.mark.parametrize("name", ["bart", "marian", "pegasus", "t5", "umt5"])
def test_labels_are_shifted_as_the_models_shift_them(name: str) -> None:
    labels = torch.tensor([[7, 8, 9, IGNORE], [4, 5, IGNORE, IGNORE]])
    model = build(name)
    ours = shift_right(labels, model.config.decoder_start_token_id, model.config.pad_token_id)
    assert torch.equal(ours, model.prepare_decoder_input_ids_from_labels(labels))
    with pytest.raises(BatchError, match=r"start=None and padding=1, and needs both; .*prepare_decoder_input_ids_from_labels"):
        shift_right(labels, None, 1)


KINDS_OF_REPLICAS = {
    "no decoder_input_ids": ("bart", "some have none; pass them on every rank"),
    "no masks": ("t5gemma", "hides the padding token by itself"),
    "positions": ("bart", "counts its positions itself and ignores decoder_position_ids"),
    "a longer row": ("bart", "the step has positions up to 64, and the table of"),
    "a longer target": ("bart", "the step has decoder_positions up to 64, and the table of"),
}


@pytest.mark.parametrize("kind", KINDS_OF_REPLICAS)
def test_what_one_replica_alone_has_is_refused_on_every_rank(kind: str, pool: Callable[[int], Ranks]) -> None:
    name, text = KINDS_OF_REPLICAS[kind]
    for said in pool(2).run(replicas_of_unequal_kind, kind, name):
        assert text in said


def replicas_of_unequal_kind(kind: str, name: str) -> str:
    mesh, model = mesh_of(), build(name)
    parallelize(model, mesh)
    whole = batches(name, "even")
    long = torch.full((2, 65), 5)
    others: dict[str, dict[str, Tensor]] = {
        "no decoder_input_ids": {"input_ids": whole["input_ids"][:0]},
        "no masks": {key: value for key, value in whole.items() if "mask" not in key},
        "positions": whole | {"decoder_position_ids": torch.arange(16).expand(2, 16)},
        "a longer row": whole | {"input_ids": long},
        "a longer target": whole | {"decoder_input_ids": long, "labels": long},
    }
    whole = others[kind] if mesh.coordinate.data_rank == 1 else whole
    try:
        model(**shard_batch(whole, mesh, shift=False))
    except LongspanError as error:
        return str(error)
    return "nothing was refused"


class OfPadding(transformers.BartForConditionalGeneration):
    """Learns nothing from padding, by its id: a loss of its own."""

    def forward(self, labels: Tensor | None = None, **given: Any) -> Any:
        output = super().forward(**given)
        if labels is not None:
            loss = torch.nn.CrossEntropyLoss(ignore_index=self.config.pad_token_id)
            output.loss = loss(output.logits.flatten(0, 1), labels.where(labels != IGNORE, self.config.pad_token_id).flatten())
        return output


def test_a_loss_that_ignores_padding_by_its_id_is_not_the_plain_one(pool: Callable[[int], Ranks]) -> None:
    assert pool(1).run(kind_of_loss) == [None]


def kind_of_loss() -> str | None:
    state: Any = parallel_state(parallelize(OfPadding(build("bart").config), mesh_of()))
    kind: str | None = state.adapter.loss_kind
    return kind


def test_labels_that_the_head_does_not_know_are_refused_on_every_rank(pool: Callable[[int], Ranks]) -> None:
    for said in pool(2).run(unknown_labels):
        assert "the step holds label 5, and BertForTokenClassification tells 0 to 2 apart" in said


def bert(**more: Any) -> Any:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 97}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForTokenClassification(transformers.BertConfig(**shape, **none, **more))


def unknown_labels() -> str:
    mesh, ids = mesh_of(2), torch.full((1, 8), 5)
    model = parallelize(bert(num_labels=3), mesh)
    labels = torch.zeros_like(ids)
    labels[0, -1] = 5
    with pytest.raises(BatchError) as error:
        model(**shard_batch({"input_ids": ids, "labels": labels}, mesh, shift=False))
    return str(error.value)


def test_a_forward_that_was_given_answers_as_asked_and_goes_though_it_was_wrapped(pool: Callable[[int], Ranks]) -> None:
    pool(1).run(wrapped_forward)


def wrapped_forward() -> None:
    mesh, ids = mesh_of(), torch.full((1, 8), 2)
    model = parallelize(bert(num_labels=3).eval(), mesh)
    part = shard_batch({"input_ids": ids, "labels": torch.ones_like(ids)}, mesh, shift=False)
    loss, logits = model(**part, return_dict=False)
    assert loss.ndim == 0
    assert logits.shape == (1, 8, 3)
    model._original_forward = model.forward  # as accelerate does for mixed precision
    model.forward = lambda *args, **given: model._original_forward(*args, **given)
    unparallelize(model)
    assert not {"forward", "_original_forward"} & set(vars(model))
    assert torch.allclose(model(input_ids=ids, labels=torch.ones_like(ids)).loss, loss)
