"""Law 1 for encoder-decoders of Transformers: two rows of tokens, each cut by its own length, against one device; or a refusal.

The reference is the untouched model, its own attention and its own loss. All in fp64; T5Gemma, whose own attention with a
softcap computes in fp32, says so by its tolerance.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor

from longspan import BatchError, ModelError, ParallelMesh, parallelize, shard, shift_right, unparallelize, unshard
from longspan.batch import IGNORE, cut
from longspan.mesh import Place
from ranks import Ranks

transformers.logging.set_verbosity_error()

COMMON: dict[str, Any] = {
    "vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "dropout": 0.0,
    "attention_dropout": 0.0, "activation_dropout": 0.0, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    "decoder_start_token_id": 2,
}  # fmt: skip
GEMMA: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "dropout_rate": 0.0, "attention_dropout": 0.0,
    "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "max_position_embeddings": 64,
}  # fmt: skip
KINDS = {"bart": "Bart", "mbart": "MBart", "pegasus": "Pegasus", "marian": "Marian", "plbart": "PLBart", "t5gemma": "T5Gemma"}
BATCHES = ["even", "odd lengths", "few targets", "left padding", "right padding", "a rank without labels", "packed targets"]
LAYOUTS = [(2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]


def build(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    if name == "t5gemma":
        sides = {side: transformers.T5GemmaModuleConfig(**GEMMA) for side in ("encoder", "decoder")}
        config = transformers.T5GemmaConfig(**sides, vocab_size=97, **more)
        config.pad_token_id, config.decoder_start_token_id = 1, 2
        model = transformers.T5GemmaForConditionalGeneration(config)
    else:
        config = getattr(transformers, f"{KINDS[name]}Config")(**COMMON | more)
        kind = "MarianMTModel" if name == "marian" else f"{KINDS[name]}ForConditionalGeneration"
        model = getattr(transformers, kind)(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.to(torch.float32 if name == "t5gemma" else torch.float64).train()


def tolerance_of(name: str) -> float:
    return 1e-5 if name == "t5gemma" else 1e-10


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
    mesh = ParallelMesh(ulysses, ring)
    reference = build(name)
    model, whole, tolerance = deepcopy(reference), batches(name, batch), tolerance_of(name)
    parallelize(model, mesh, zero, **tools)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (reference, model)]
    for step in range(1 + steps):
        expected = alone(reference, whole)
        expected.loss.backward()
        part = shard(whole, mesh, shift=False)
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


@pytest.mark.parametrize(("name", "batch"), PAIRS)
def test_every_pair_under_one_layout(name: str, batch: str, pool: Callable[[int], Ranks]) -> None:
    """Ulysses 2 for the even batch, with three steps of AdamW; for the others the layouts in turn."""
    turn = [(2, 1), (1, 2), (2, 2), (1, 2), (2, 1), (1, 4), (4, 1)]
    ulysses, ring = LAYOUTS[0] if batch == "even" else turn[PAIRS.index((name, batch)) % len(turn)]
    pool(ulysses * ring).run(compare, name, batch, ulysses, ring, 0, 3 if batch == "even" else 0)


@pytest.mark.long
@pytest.mark.parametrize(("ulysses", "ring"), LAYOUTS)
@pytest.mark.parametrize(("name", "batch"), PAIRS)
def test_every_pair_under_every_layout(name: str, batch: str, ulysses: int, ring: int, pool: Callable[[int], Ranks]) -> None:
    pool(ulysses * ring).run(compare, name, batch, ulysses, ring, 0, 3)
