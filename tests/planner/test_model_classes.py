"""The axes that split a Hugging Face model, and the encoders: the tables are those of docs/plans.md and docs/models.md."""

from pathlib import Path
from typing import Any

import pytest

from longspan import plan
from longspan.errors import LayoutError, ModelError
from longspan.planner.model_classes import ENCODERS, PIPELINE, TENSOR
from longspan.planner.model_config import read_config
from longspan.planner.search import degree_rows
from longspan.planner.setting import Setting

DOCS = Path(__file__).parents[2] / "docs"
CONFIG = {"num_hidden_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "vocab_size": 1000, "intermediate_size": 1024}


def _rows(page: str, *names: str) -> list[list[str]]:
    lines = [[cell.strip() for cell in line.split("|")] for line in (DOCS / page).read_text().splitlines()]
    return [line for line in lines if len(line) > 4 and line[1].endswith(names)]


@pytest.mark.parametrize(("column", "held"), [(3, TENSOR), (4, PIPELINE)])
def test_a_type_that_is_exact_in_every_class_is_split(column: int, held: frozenset[str]) -> None:
    verdicts: dict[str, set[str]] = {}
    for row in _rows("plans.md", "ForCausalLM"):
        verdicts.setdefault(row[2], set()).add(row[column])
    assert held == {kind for kind, found in verdicts.items() if found == {"exact"}}


def test_the_encoders_are_the_types_whose_class_predicts_masked_tokens() -> None:
    assert {row[2] for row in _rows("models.md", "ForMaskedLM")} == ENCODERS


@pytest.mark.parametrize(
    ("kind", "more", "whole"),
    [("llama", {}, ()), ("deepseek_v3", {}, ("tensor",)), ("gpt2", {}, ("tensor", "pipeline")),
     ("gpt_oss", {}, ("tensor",)), ("nemotron", {}, ("pipeline",)),
     ("mixtral", {"output_router_logits": True}, ("tensor", "pipeline"))],
)  # fmt: skip
def test_a_class_without_a_plan_is_planned_without_that_axis(kind: str, more: dict[str, Any], whole: tuple[str, ...]) -> None:
    config = CONFIG | {"model_type": kind} | more
    shape = read_config(config)
    found = plan(config, gpus=8, tokens=1024, rows=8)
    rows = degree_rows(Setting(shape, found.cluster, found.best.setting.recipe, found.workload), {})
    split = {"tensor": rows[:, 4].max() > 1, "pipeline": rows[:, 0].max() > 1}
    assert split == {axis: axis not in whole for axis in split}
    for axis in whole:
        with pytest.raises(LayoutError, match=f"{axis}=2 is refused for the class of {kind}.*use {axis}=1 with"):
            plan(config, gpus=8, tokens=1024, rows=8, fixed={axis: 2})


def test_an_encoder_is_refused() -> None:
    with pytest.raises(ModelError, match=r"an encoder .bert., .*pass a decoder"):
        plan(CONFIG | {"model_type": "bert"}, tokens=512)
