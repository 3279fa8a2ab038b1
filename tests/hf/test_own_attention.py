"""Models that attend in their own code, or hand their attention no keywords: guarantee 1, or a refusal by name."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from longspan import Causal, Documents, MemoryOptions, ModelError, ParallelMesh, cross_entropy, parallelize, shard_batch
from longspan.batch.labels import IGNORE
from longspan.hf.loss import is_in_place
from longspan.models.adapter import parallel_state
from tests.helpers.hf_models import OWN_KINDS, assert_gradients, batches, build, targets
from tests.helpers.ranks import Ranks, mesh_of

LENGTHS = (7, 12, 5)


def loss_alone(model: Any, whole: dict[str, Tensor], shifted: bool) -> Tensor:
    given = {name: value for name, value in whole.items() if name != "labels"}
    return cross_entropy(model(**given, return_dict=True).logits, targets(whole["labels"], not shifted))


def loss_of_documents(model: Any, whole: dict[str, Tensor], shifted: bool) -> Tensor:
    """The loss of documents that never met."""
    pieces = whole["input_ids"].split(LENGTHS, 1)
    logits = torch.cat([model(input_ids=piece, return_dict=True).logits for piece in pieces], 1)
    return cross_entropy(logits, targets(whole["labels"], not shifted))


def compare(name: str, batch: str, ulysses: int, ring: int, zero: int, memory: MemoryOptions, checkpointing: bool) -> None:
    kind, mesh = OWN_KINDS[name], mesh_of(ulysses, ring)
    reference = build(name)
    reference.config.use_cache = False
    model, shifted = deepcopy(reference), "ForMaskedLM" not in kind.model
    whole = batches("even" if batch == "documents" else batch, not shifted)
    if batch == "documents":
        whole["labels"][:, [0, 7, 19]] = IGNORE
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = (loss_of_documents if batch == "documents" else loss_alone)(reference, whole, shifted)
    expected.backward()
    parallelize(model, mesh, zero=zero, memory=memory)
    state: Any = parallel_state(model)
    in_place = is_in_place(state.adapter.loss_kind)
    mine = whole | {"labels": targets(whole["labels"], not shifted) if in_place else whole["labels"]}
    mask = None if batch != "documents" else Documents(LENGTHS) & Causal() if shifted else Documents(LENGTHS)
    part = shard_batch(mine, mesh, shift=not in_place, mask=mask)
    found = model(**part).loss
    found.backward()
    assert abs(found.item() - expected.item()) <= kind.tolerance * abs(expected.item()), name
    assert_gradients(model, reference, kind.tolerance)


def test_plain_padded_and_packed_rows_are_those_of_one_device(pool: Callable[[int], Ranks]) -> None:
    pool(2).run(each_kind)


def each_kind() -> None:
    layouts, rows = [(2, 1), (1, 2)], ["left padding", "documents", "right padding"]
    for turn, name in enumerate(OWN_KINDS):
        for batch in (rows[turn % 3], rows[(turn + 1) % 3]):
            compare(name, batch, *layouts[turn % 2], 0, MemoryOptions(), False)


@pytest.mark.long
@pytest.mark.parametrize("name", OWN_KINDS)
def test_every_kind_under_every_layout(name: str, pool: Callable[[int], Ranks]) -> None:
    for ulysses, ring in ((2, 1), (1, 2), (2, 2)):
        for batch in ("odd length", "left padding", "right padding", "documents", "a rank without labels"):
            pool(ulysses * ring).run(compare, name, batch, ulysses, ring, 0, MemoryOptions(), False)


@pytest.mark.parametrize(
    ("zero", "memory", "checkpointing"),
    [
        (3, MemoryOptions(recompute="selective"), False),
        (0, MemoryOptions(recompute="full", chunked_loss=True, tile_tokens=4), False),
        (0, MemoryOptions(), True),
    ],
)
def test_the_step_is_there_again_when_a_block_is_computed_again(
    zero: int, memory: MemoryOptions, checkpointing: bool, pool: Callable[[int], Ranks]
) -> None:
    """By longspan's checkpoint, which repeats the block's keywords, and by Transformers', which repeats its tensors."""
    pool(2).run(compare, "gptj", "right padding", 2, 1, zero, memory, checkpointing)


# ---- refusals, on one rank


def gpt_neo_with(change: Callable[[Any, Tensor, Tensor, Tensor, Any], Tensor]) -> Any:
    """A GPT-Neo each of whose attentions is this function, and whose config names no windows any more."""
    model = build("gpt_neo")
    model.config.attention_types, model.config.window_size = [], 0
    for module in model.modules():
        if type(module).__name__ == "GPTNeoSelfAttention":
            module._attn = lambda q, k, v, mask=None, own=module: (change(own, q, k, v, mask), None)
    return model


def scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, k.transpose(-1, -2)) / 3


def softmax_over_queries(own: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return torch.matmul(torch.softmax(scores(q, k) + mask, 2), v)


def squared(own: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return torch.matmul(torch.softmax(scores(q, k) ** 2 + mask, -1), v)


def two_products(own: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return torch.matmul(torch.softmax(scores(q, k) + scores(k, q) + mask, -1), v)


def of_square_distances(own: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    far = torch.arange(q.shape[-2], dtype=q.dtype) ** 2
    return torch.matmul(torch.softmax(scores(q, k) - far + mask, -1), v)


def some_heads_see_less(own: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    hidden = torch.zeros(4, q.shape[-2], q.shape[-2], dtype=torch.bool)
    hidden[1, 5:, 2] = True
    return torch.matmul(torch.softmax((scores(q, k) + mask).masked_fill(hidden, -1e9), -1), v)


def every_second_key(own: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    hidden = torch.arange(q.shape[-2]) % 2 == 1
    return torch.matmul(torch.softmax((scores(q, k) + mask).masked_fill(hidden, -1e9), -1), v)


def softly_hidden(own: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    late = torch.arange(q.shape[-2]) > 5
    return torch.matmul(torch.softmax((scores(q, k) + mask).masked_fill(late, -3.0), -1), v)


def a_product_of_values(own: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return torch.matmul(torch.softmax(torch.matmul(v, v.transpose(-1, -2)) + mask, -1) ** 2, v)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (softmax_over_queries, "does softmax over dim 2 with its scores"),
        (squared, "does pow with its scores"),
        (two_products, "does a sum with its scores"),
        (
            of_square_distances,
            r"GPTNeoSelfAttention .* adds a bias of shape .* to its scores that is no slope times the distance",
        ),
        (some_heads_see_less, "hides other keys in one head than in another"),
        (every_second_key, "was given a mask that is none of causal, full, sliding or chunked"),
        (softly_hidden, "does masked_fill with -3.0 with its scores"),
        (a_product_of_values, "does pow with its probabilities"),
    ],
)
def test_what_is_no_attention_of_bands_is_refused_by_name(change: Callable[..., Tensor], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        parallelize(gpt_neo_with(change), ParallelMesh())


def test_a_term_that_was_not_proven_is_refused_at_the_call() -> None:
    late: list[bool] = []

    def change(own: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        plain = scores(q, k) + mask
        return torch.matmul(torch.softmax(plain * 2 if late else plain, -1), v)

    model = parallelize(gpt_neo_with(change), mesh := ParallelMesh())
    part = shard_batch({"input_ids": torch.arange(3, 26).unsqueeze(0)}, mesh)
    model(**part)
    late.append(True)
    with pytest.raises(ModelError, match=r"'transformer.h.0.attn.attention' .* something else with its scores than"):
        model(**part)


def test_a_window_that_the_proof_s_rows_do_not_show_is_that_of_one_device(pool: Callable[[int], Ranks]) -> None:
    """It stands in a buffer of all positions, of which the proof sees a slice."""
    name = "gpt_neo, a window longer than the proof's rows"
    pool(2).run(compare, name, "odd length", 2, 1, 0, MemoryOptions(), False)
    pool(2).run(compare, name, "left padding", 1, 2, 0, MemoryOptions(), False)


def test_a_window_that_short_rows_do_not_show_is_refused() -> None:
    """gpt_neo's window stands in a buffer of all its positions; without it nothing tells how far a query sees."""
    model = build("gpt_neo, windows")
    model.config.window_size = 40
    for module in model.modules():
        if hasattr(module, "bias") and type(module).__name__ == "GPTNeoSelfAttention":
            module.bias = module.bias[:, :, :30, :30].clone()
    parallelize(model, ParallelMesh())  # known up to the length of the buffer
    other = gpt_neo_with(lambda own, q, k, v, mask: torch.matmul(torch.softmax(scores(q, k) + hidden(q), -1), v))
    other.config.attention_window = 40
    with pytest.raises(ModelError, match=r"builds its mask itself under config\.attention_window"):
        parallelize(other, ParallelMesh())


def hidden(q: Tensor) -> Tensor:
    return torch.full((q.shape[-2], q.shape[-2]), float("-inf"), dtype=q.dtype).triu(1)


def test_attention_by_blocks_on_long_rows_is_refused() -> None:
    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    config = transformers.BigBirdConfig(**settings, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    with pytest.raises(ModelError, match=r"has config\.block_size, by which it attends otherwise on longer rows"):
        parallelize(transformers.BigBirdForMaskedLM(config), ParallelMesh())


def test_a_module_that_mixes_tokens_beside_its_attention_is_refused() -> None:
    def shifted(own: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return torch.matmul(torch.softmax(scores(q, k) + mask, -1), v) + v.roll(1, 2)

    with pytest.raises(ModelError, match="mixes tokens outside attention"):
        parallelize(gpt_neo_with(shifted), ParallelMesh())
