"""Which models of Transformers are exact under tensor and pipeline parallelism: benchmarks/plan_matrix.py [NAME ...]

Every class of AutoModelForCausalLM that has a plan for one of them (``base_model_tp_plan``, ``base_model_pp_plan``) and can be
built at a tiny size: the loss and every gradient on two ranks, tensor=2 and pipeline=2 with two micro-batches, against the
untouched model on one device. Batches, tolerance and verdicts are those of benchmarks/model_matrix.py. Writes docs/plans.md.
"""

import argparse
import json
import textwrap
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import model_matrix as single
import transformers
from rank_pair import Pair
from tiny_models import Class, classes

from longspan import Documents, LongspanError, ParallelMesh, cross_entropy, forward_backward, parallelize, shard_batch
from longspan.hf.loss import is_in_place
from longspan.models.adapter import parallel_state

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "runs" / "plan_matrix.json", ROOT / "docs" / "plans.md"
AXES = {"tensor": "base_model_tp_plan", "pipeline": "base_model_pp_plan"}
BATCHES = ("plain", "padded", "packed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types, such as llama; default: all that have no result yet")
    asked = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    causal = [one for one in classes() if one.kind == "causal"]
    wanted = [one for one in causal if one.type in asked.names or (not asked.names and one.key not in results)]
    with Pair(_judge, {axis: {axis: 2} for axis in AXES}) as pair:
        for one in wanted:
            began = time.time()
            results[one.key] = pair.judge(one)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1))
            print(f"{one.key}: {single.summary(results[one.key])} ({time.time() - began:.1f} s)", flush=True)
    if not asked.names:
        PAGE.write_text(page({one: results[one.key] for one in causal if results.get(one.key, {}).get("cells")}))


def _judge(one: Class, meshes: dict[str, ParallelMesh]) -> dict[str, Any]:
    try:
        reference, expected = single.reference_of(one)
    except Exception as error:
        return {"cells": {}, "reason": single.sentence(error)}
    found: dict[str, Any] = {"cells": {}}
    for name in BATCHES[1:]:
        try:
            expected[name] = single.on_one_device(one, reference, name)
        except Exception as error:
            expected[name] = {"verdict": "undefined", "reason": single.sentence(error)}
    base = getattr(reference, "base_model", None)
    for axis, field in AXES.items():
        if not getattr(getattr(base, "config", None), field, None):
            continue
        for name in BATCHES:
            cell = expected[name] if "verdict" in expected[name] else _cell(one, reference, name, meshes[axis], expected[name])
            found["cells"][f"{axis} {name}"] = cell
            if cell.get("fails"):
                return found | {"desynchronised": True}
    return found if found["cells"] else found | {"reason": "has neither plan"}


def _cell(one: Class, reference: Any, name: str, mesh: ParallelMesh, expected: dict[str, Any]) -> dict[str, Any]:
    model = deepcopy(reference)
    try:
        parallelize(model, mesh)
        loss = _loss(one, model, name, mesh, expected)
    except LongspanError as error:
        return single.refused(error)
    except Exception as error:
        return single.failed(error)
    worst, where = single.worst_error(model, loss, expected)
    exact = worst <= single.TOLERANCE
    reason = "" if exact else f"{where} differs by {worst:.1e}"
    return {"verdict": "exact" if exact else "wrong", "error": float(f"{worst:.1e}"), "reason": reason}


def _loss(one: Class, model: Any, name: str, mesh: ParallelMesh, expected: dict[str, Any]) -> float:
    """The loss of the batch, after its backward; on a pipeline of the batch twice, whose mean is that of the batch."""
    state = parallel_state(model)
    assert state is not None
    adapter: Any = state.adapter
    shift, by_itself = not is_in_place(adapter.loss_kind), adapter.computes_loss()
    mask = Documents(single.DOCUMENTS) if name == "packed" else None
    batch = single.batch_of(one, name, expected["left"])
    if mesh.coordinate.pipeline > 1:
        return forward_backward(model, shard_batch([batch, dict(batch)], mesh, shift=shift, mask=mask)).item()
    part = shard_batch(batch, mesh, shift=shift, mask=mask)
    given = part if by_itself else {key: value for key, value in part.items() if "labels" not in key}
    output = model(**given)
    info = part["longspan"]
    loss = (
        output.loss if by_itself else cross_entropy(output.logits, part["shift_labels"], mesh=mesh, num_labels=info.num_labels)
    )
    loss.backward()
    return float(loss)


HEAD = """# Tensor and pipeline parallelism of Transformers' models

Every class of `AutoModelForCausalLM` of Transformers {version} that has a plan for one of them and can be built at a tiny
size: the loss and every gradient on two ranks, `tensor=2` and `pipeline=2`, against one device. Written by
`python benchmarks/plan_matrix.py`, which says what is compared with what; do not edit it. Batches and verdicts are those of
[models.md](models.md).

{counts}

| class | model type | tensor | pipeline |
|---|---|---|---|
"""


def page(results: dict[Class, Any]) -> str:
    """docs/plans.md from the results of each class."""
    cells = {one: {axis: _verdict(result, axis) for axis in AXES} for one, result in results.items()}
    counts = [
        f"{axis}: {sum(verdicts[axis] not in ('no plan',) for verdicts in cells.values())} with a plan, "
        f"{sum(verdicts[axis] == 'exact' for verdicts in cells.values())} exact, "
        f"{sum('wrong' in verdicts[axis] for verdicts in cells.values())} wrong"
        for axis in AXES
    ]
    order = sorted(results, key=lambda one: one.name.lower())
    rows = "".join(f"| {one.name} | {one.type} | {' | '.join(cells[one][axis] for axis in AXES)} |\n" for one in order)
    reasons = "".join(f"- {one.name} (`{one.type}`): {why}\n" for one in order if (why := _why(results[one])))
    head = HEAD.format(version=transformers.__version__, counts=textwrap.fill("; ".join(counts) + ".", 126))
    return f"{head}{rows}\n## Why not\n\n{reasons}"


def _verdict(result: dict[str, Any], axis: str) -> str:
    found = [result["cells"][f"{axis} {name}"]["verdict"] for name in BATCHES if f"{axis} {name}" in result["cells"]]
    if not found:
        return "no plan"
    asked = [verdict for verdict in found if verdict != "undefined"]
    return asked[0] if len(set(asked)) == 1 else " / ".join(found)


def _why(result: dict[str, Any]) -> str:
    cells = {name: cell for name, cell in result["cells"].items() if cell["verdict"] in ("refused", "wrong")}
    return "; ".join(dict.fromkeys(f"{name.split()[0]}: {cell['reason']}" for name, cell in cells.items()))


if __name__ == "__main__":
    main()
