"""docs/models.md from the results of benchmarks/model_matrix.py: which classes are exact, which refused and why."""

import textwrap
from typing import Any

import transformers
from tiny_models import Class, classes

LAYOUTS = ("ulysses", "ring")
BATCHES = ("plain", "padded", "packed", "positions")
TOKENS = 23
TOLERANCE = 1e-5
STATE_SPACE, LINEAR, CONVOLUTION = "state spaces", "linear attention", "convolutions over tokens"
NOT_SOFTMAX = {
    **dict.fromkeys(("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "mamba", "mamba2", "nemotron_h",
                     "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2"), STATE_SPACE),
    **dict.fromkeys(("bailing_hybrid", "kimi_linear", "minimax", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text",
                     "qwen3_5_text", "qwen3_next", "qwen4_exp", "qwen4_exp_text"), LINEAR),
    **dict.fromkeys(("convbert", "lfm2_moe", "lfm3", "mobilebert", "nystromformer", "zaya"), CONVOLUTION),
    "fnet": "Fourier transforms", "funnel": "pooling over tokens", "mra": "approximate attention",
    "yoso": "approximate attention", "reformer": "attention within buckets of hashes", "perceiver": "a number of latents",
}  # fmt: skip
"""Model types with layers that are no softmax attention, with what they are."""


def verdict_of(result: dict[str, Any]) -> str:
    """The verdict of a class: its worst cell."""
    found = {cell["verdict"] for cell in result["cells"].values()}
    return next((each for each in ("wrong", "refused", "exact") if each in found), "not built")


HEAD = """# Models of Transformers

Every class of `AutoModelForCausalLM`, `AutoModelForMaskedLM` and `AutoModelForSeq2SeqLM` of Transformers {version} that can be
built at a tiny size: the loss and every gradient on two ranks against one device, with `ulysses=2` and with `ring=2`. Written
by `make model-matrix` (`benchmarks/model_matrix.py`), which says what is compared with what; do not edit it.

{summary}

`exact`: within {tolerance:.0e} (guarantee 1 for fp32, in which norms, experts and losses of Transformers compute). `refused`:
by a sentence, the same on every rank, before anything is computed. `undefined`: the model itself cannot be given such a batch,
an encoder-decoder for example no documents within a row. `a / b`: `ulysses=2` / `ring=2`. Columns: a row of {tokens} tokens;
two rows with padding on the left and on the right; two documents in a row, against each by itself; the same documents as
`position_ids` that restart, against the model's own treatment of them.

| class | model type | plain | padded | packed | positions |
|---|---|---|---|---|---|
"""


def page(results: dict[str, Any]) -> str:
    """docs/models.md."""
    judged = {one: results[one.key] for one in classes() if one.key in results}
    built = {one: result for one, result in judged.items() if result["cells"]}
    order = sorted(built, key=lambda one: (not is_exact(built[one]), one.type in NOT_SOFTMAX, one.kind, one.name.lower()))
    rows = "".join(_row(one, built[one]) for one in order)
    reasons = "".join(f"- {one.name} (`{one.type}`): {why}\n" for one in order if (why := _why(one, built[one])))
    rest = "".join(
        f"- {one.name} (`{one.type}`): {result['reason']}\n" for one, result in judged.items() if not result["cells"]
    )
    summary = textwrap.fill(_counts(built, judged), 126)
    head = HEAD.format(version=transformers.__version__, summary=summary, tolerance=TOLERANCE, tokens=TOKENS)
    return f"{head}{rows}\n## Why not\n\n{reasons}\n## Not built so small\n\n{rest}"


def is_exact(result: dict[str, Any]) -> bool:
    """Whether plain, padded and packed rows are exact under both layouts, where the model has such rows."""
    asked = [cell["verdict"] for name, cell in result["cells"].items() if not name.endswith("positions")]
    return set(asked) - {"undefined"} == {"exact"}


def _counts(built: dict[Class, Any], judged: dict[Class, Any]) -> str:
    softmax = [one for one in built if one.type not in NOT_SOFTMAX]
    exact, wrong = (sum(map(test, (built[one] for one in softmax))) for test in (is_exact, _is_wrong))
    return (
        f"Of {len(judged)} classes {len(judged) - len(built)} cannot be built so small, and {len(built) - len(softmax)} have "
        f"layers that are no softmax attention. Of the other {len(softmax)}, {exact} are "
        f"exact with plain, padded and packed rows under both layouts ({exact / len(softmax):.0%}), and {wrong} wrong; wrong "
        f"in all: {sum(map(_is_wrong, built.values()))}."
    )


def _is_wrong(result: dict[str, Any]) -> bool:
    return verdict_of(result) == "wrong"


def _row(one: Class, result: dict[str, Any]) -> str:
    columns = []
    for name in BATCHES:
        found = [result["cells"].get(f"{layout} {name}", {"verdict": "wrong"})["verdict"] for layout in LAYOUTS]
        columns.append(found[0] if len(set(found)) == 1 else " / ".join(found))
    return f"| {one.name} | {one.type} | {' | '.join(columns)} |\n"


def _why(one: Class, result: dict[str, Any]) -> str:
    reasons = [cell["reason"] for cell in result["cells"].values() if cell["verdict"] in ("refused", "wrong")]
    kind = f"{NOT_SOFTMAX[one.type]}. " if one.type in NOT_SOFTMAX else ""
    return kind + "; ".join(dict.fromkeys(reasons))
