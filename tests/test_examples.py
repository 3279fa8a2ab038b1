"""Every example runs, on one rank and on two, and prints the same numbers once."""

import contextlib
import io
import re
import runpy
from pathlib import Path

import peft
import pytest
from transformers import LlamaForCausalLM, Qwen3ForCausalLM

from tests.helpers.ranks import on_ranks

IMPORTED = (peft, LlamaForCausalLM, Qwen3ForCausalLM)  # here, once, and not by every rank of every example
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_the_same_on_one_rank_and_on_two(example: Path, tmp_path: Path) -> None:
    (alone,) = on_ranks(1, printed, example, tmp_path=tmp_path)
    numbers = [float(number) for number in re.findall(r"\d+\.\d+", alone)]
    assert numbers
    first, second = on_ranks(2, printed, example, tmp_path=tmp_path)
    assert [float(number) for number in re.findall(r"\d+\.\d+", first)] == pytest.approx(numbers, rel=2e-4)
    assert not re.findall(r"\d+\.\d+", second)  # every line once, under torchrun too
    assert len(example.read_text().splitlines()) < 60


def printed(example: Path) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(example), run_name="__main__")
    return out.getvalue()
