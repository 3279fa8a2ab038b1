"""Which language models of Transformers are exact on two ranks, and which are refused: benchmarks/model_matrix.py [NAME ...]

Every class of AutoModelForCausalLM, AutoModelForMaskedLM and AutoModelForSeq2SeqLM that can be built at a tiny size, with
random weights: the loss and every gradient over two ranks, ulysses=2 and ring=2, against the untouched model on one device, in
fp64, or in fp32 where the model cannot. Norms, experts and losses of Transformers compute in fp32 inside an fp64 model too:
the tolerance is that of fp32.

    plain       a row of 23 tokens                       packed      documents of 9 and 14 tokens, mask=Documents([9, 14]),
    padded      two rows of 22: 3 tokens of padding                  against each document by itself
                on the left, 6 on the right              positions   the same documents as position_ids that restart

    exact       every gradient within 1e-5               refused     by a LongspanError, before anything is computed
    wrong       not: a defect of longspan                undefined   the model itself cannot be given such a batch

Results are kept in runs/model_matrix.json, so that a run that was ended goes on; docs/models.md is written from them.
"""

import argparse
import json
import time
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from model_page import BATCHES, LAYOUTS, TOKENS, TOLERANCE, page, verdict_of
from rank_pair import Pair
from tiny_models import Class, build, classes
from torch.distributed.tensor import DTensor

from longspan import Documents, LongspanError, ParallelMesh, cross_entropy, parallelize, shard_batch, unparallelize
from longspan.batch.labels import IGNORE
from longspan.hf.loss import is_in_place
from longspan.hf.names import is_encoder_decoder
from longspan.models.adapter import parallel_state

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "runs" / "model_matrix.json"
PAGE = ROOT / "docs" / "models.md"
ROW, DOCUMENTS = 22, (9, 14)
LEFT, RIGHT = 3, 6
MASKED = ("flaubert", "xlm")
"""Model types that hide padding by its id where no mask is given, and of each rank's alone: every batch has a mask."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types, such as llama; default: all that have no result yet")
    parser.add_argument("--again", nargs="*", default=[], help="verdicts to try once more, such as refused wrong")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    asked = parser.parse_args()
    results: dict[str, Any] = json.loads(asked.results.read_text()) if asked.results.exists() else {}
    wanted = [one for one in classes() if one.type in asked.names or (not asked.names and _is_open(results, one, asked.again))]
    with Pair(_judge, {name: {name: 2} for name in LAYOUTS}) as pair:
        for one in wanted:
            began = time.time()
            results[one.key] = pair.judge(one)
            asked.results.parent.mkdir(exist_ok=True)
            asked.results.write_text(json.dumps(results, indent=1))
            print(f"{one.key}: {summary(results[one.key])} ({time.time() - began:.1f} s)", flush=True)
    if not asked.names:
        asked.page.write_text(page(results))


def _is_open(results: dict[str, Any], one: Class, again: list[str]) -> bool:
    return one.key not in results or verdict_of(results[one.key]) in again


def summary(result: dict[str, Any]) -> str:
    cells = Counter(cell["verdict"] for cell in result["cells"].values())
    why = result.get("reason") or next((cell["reason"] for cell in result["cells"].values() if cell.get("reason")), "")
    return f"{dict(cells) or 'not built'} {why[:300]}"


def _judge(one: Class, meshes: dict[str, ParallelMesh]) -> dict[str, Any]:
    try:
        reference, expected = reference_of(one)
    except Exception as error:
        return {"cells": {}, "reason": sentence(error)}
    if one.kind == "seq2seq" and not is_encoder_decoder(reference):
        one = one._replace(kind="causal")  # speech models whose text model is a decoder
    found: dict[str, Any] = {"cells": {}, "dtype": str(reference.dtype).removeprefix("torch.")}
    for name in BATCHES[1:]:
        try:
            expected[name] = on_one_device(one, reference, name)
        except Exception as error:
            expected[name] = {"verdict": "undefined", "reason": sentence(error)}
    for layout, mesh in meshes.items():
        cells = _on_layout(one, deepcopy(reference), mesh, expected)
        found["cells"] |= {f"{layout} {name}": cell for name, cell in cells.items()}
        if any(cell.get("fails") for cell in cells.values()):
            return found | {"desynchronised": True}
    return found


def reference_of(one: Class) -> tuple[Any, dict[str, Any]]:
    """The model, in fp64 where it accepts that, and its loss and gradients of the plain batch."""
    model = build(one)
    if one.kind == "seq2seq" and not is_encoder_decoder(model):
        one = one._replace(kind="causal")
    try:
        double = deepcopy(model).double()
        return double, {"plain": on_one_device(one, double, "plain")}
    except Exception:
        return model, {"plain": on_one_device(one, model, "plain")}


def _on_layout(one: Class, model: Any, mesh: ParallelMesh, expected: dict[str, Any]) -> dict[str, Any]:
    """A cell for each batch."""
    try:
        parallelize(model, mesh)
    except LongspanError as error:
        return {name: cell if "verdict" in cell else refused(error) for name, cell in expected.items()}
    except Exception as error:
        return {name: failed(error) for name in expected}
    cells = {}
    for name, cell in expected.items():
        if "verdict" not in cell:
            try:
                cell = _over_ranks(one, model, name, mesh, cell)
            except LongspanError as error:
                cell = refused(error)
            except Exception as error:
                cell = failed(error)
        cells[name] = cell
        if cell.get("fails"):
            return cells
    unparallelize(model)
    return cells


def refused(error: LongspanError) -> dict[str, Any]:
    return {"verdict": "refused", "reason": f"{type(error).__name__}: {sentence(error, False)}"}


def failed(error: Exception) -> dict[str, Any]:
    return {"verdict": "wrong", "fails": True, "reason": f"fails: {sentence(error)}"}


def sentence(error: Exception, kind: bool = True) -> str:
    text = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {text}" if kind else text


def batch_of(one: Class, name: str, left: int = LEFT) -> dict[str, Any]:
    """The whole batch of a column, with labels that are not learned from at padding and at the first token of a document.

    ``left``: tokens of padding on the left of the first row.
    """
    own = torch.Generator().manual_seed(1)
    rows, tokens = (2, ROW) if name == "padded" else (1, TOKENS)
    ids = torch.randint(5, 97, (rows, tokens), generator=own)
    labels, mask = ids.clone(), torch.ones_like(ids)
    if name == "padded":
        mask[0, :left], mask[1, -RIGHT:] = 0, 0
        labels[mask == 0] = IGNORE
        ids[mask == 0] = 0
        labels[0, left] = IGNORE if one.kind == "causal" else labels[0, left]
    if one.kind == "seq2seq":
        return _pair_of(ids, mask, name)
    if name in ("packed", "positions"):
        labels[:, [0, DOCUMENTS[0]]] = IGNORE
    extra = {"attention_mask": mask} if name == "padded" or one.type in MASKED else {}
    if name == "positions":
        extra |= {"position_ids": torch.cat([torch.arange(count) for count in DOCUMENTS]).unsqueeze(0)}
    return {"input_ids": ids, "labels": labels, **extra}


def _pair_of(ids: Any, mask: Any, name: str) -> dict[str, Any]:
    decoder = ids.flip(1)[:, :17].clamp(min=5)
    labels, theirs = decoder.roll(1, 1), torch.ones_like(decoder)
    if name in ("packed", "positions"):
        raise ValueError("an encoder-decoder has two rows of tokens; documents are rows of the batch")
    if name == "padded":
        theirs[0, -4:] = 0
        labels[theirs == 0] = IGNORE
        decoder[theirs == 0] = 0
    return {
        "input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder, "decoder_attention_mask": theirs,
        "labels": labels,
    }  # fmt: skip


def on_one_device(one: Class, reference: Any, name: str) -> dict[str, Any]:
    """The loss and gradients of the untouched model; without padding on the left where it gives NaN for that."""
    for left in (LEFT, 0):
        model = deepcopy(reference)
        whole = batch_of(one, name, left)
        labels = whole.pop("labels")
        if name == "packed":
            pieces = whole["input_ids"].split(list(DOCUMENTS), 1)
            logits = torch.cat([model(input_ids=piece, return_dict=True).logits for piece in pieces], 1)
        else:
            logits = model(**whole, return_dict=True).logits
        loss = cross_entropy(logits, _targets(one, labels))
        loss.backward()
        gradients = {key: value.grad for key, value in model.named_parameters()}
        if all(bool(value.isfinite().all()) for value in (loss, *gradients.values()) if value is not None):
            return {"loss": loss.item(), "gradients": gradients, "left": left}
    raise ValueError("the untouched model gives NaN")


def _targets(one: Class, labels: Any) -> Any:
    """The labels where they are predicted."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE) if one.kind == "causal" else labels


def _over_ranks(one: Class, model: Any, name: str, mesh: ParallelMesh, expected: dict[str, Any]) -> dict[str, Any]:
    model.zero_grad()
    state = parallel_state(model)
    assert state is not None
    adapter: Any = state.adapter
    by_itself, shift = adapter.computes_loss(), one.kind == "causal" and not is_in_place(adapter.loss_kind)
    mask = Documents(DOCUMENTS) if name == "packed" else None
    batch = batch_of(one, name, expected["left"])
    if not shift:
        batch["labels"] = _targets(one, batch["labels"])
    part = shard_batch(batch, mesh, shift=shift, mask=mask)
    if by_itself:
        loss = model(**part).loss
    else:
        targets = part["shift_labels" if shift else "labels"]
        given = {key: value for key, value in part.items() if "labels" not in key}
        loss = cross_entropy(model(**given).logits, targets, mesh=mesh, num_labels=part["longspan"].num_labels)
    loss.backward()
    worst, where = worst_error(model, loss.item(), expected)
    verdict = "exact" if worst <= TOLERANCE else "wrong"
    reason = f"{where} differs by {worst:.1e}" if verdict == "wrong" else ""
    return {"verdict": verdict, "error": float(f"{worst:.1e}"), "own loss": by_itself, "reason": reason}


def worst_error(model: Any, loss: float, expected: dict[str, Any]) -> tuple[float, str]:
    """The largest relative error of the loss and of the gradients, with the floor of guarantee 1, and whose it is.

    Every parameter of ``model`` that one device has under the same name is compared; one without a gradient counts as zeros. (A
    weight that is tied over two stages of a pipeline has another name on the last stage.)
    """
    wanted = expected["gradients"]
    total = torch.stack([value.norm() for value in wanted.values() if value is not None]).norm().item()
    worst = (abs(loss - expected["loss"]) / abs(expected["loss"]), "the loss")
    for key, parameter in model.named_parameters():
        if key not in wanted or (wanted[key] is None and parameter.grad is None):
            continue
        mine, theirs = (_whole(gradient, parameter) for gradient in (parameter.grad, wanted[key]))
        error = (mine - theirs).norm().item() / max(theirs.norm().item(), 1e-3 * total)
        if not error <= worst[0]:
            worst = (error, f"the gradient of {key}")
    return worst


def _whole(gradient: Any, parameter: Any) -> Any:
    if isinstance(gradient, DTensor):
        return gradient.full_tensor()
    return torch.zeros(parameter.shape, dtype=parameter.dtype) if gradient is None else gradient


if __name__ == "__main__":
    main()
