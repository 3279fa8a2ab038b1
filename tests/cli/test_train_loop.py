"""The order of a step's work in the training loop: what is read while the device computes, and what waits for it."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longspan.cli import launch, train
from longspan.cli.config import Train
from longspan.data.loader import Loader
from longspan.errors import DataError
from tests.helpers.runs import column, records, run, small, write_text

pytestmark = pytest.mark.usefixtures("launcher")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 documents of words that repeat, 24 kB."""
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def in_order(config: Train) -> int:
    """Train, and write what each rank did in which order: fetch STEP, agree, compute, read."""
    order: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            order.append(f"fetch {args[1] + 1}" if name == "fetch" else name)
            return function(*args, **keywords)

        return call

    Loader.step = noted("fetch", Loader.step)  # type: ignore[method-assign]
    for name, function in (("agree", "sync_batches"), ("compute", "forward_backward"), ("read", "_read")):
        setattr(train, function, noted(name, getattr(train, function)))
    code = train.work(config)
    Path(config.runs_folder, f"order{dist.get_rank()}").write_text(", ".join(order))
    return code


def test_the_next_step_is_fetched_before_the_host_waits_for_this_one(text: str, tmp_path: Path) -> None:
    run(small(text, tmp_path, steps=3), f"{__name__}:in_order")
    for rank in range(2):
        assert (tmp_path / f"order{rank}").read_text() == (
            "fetch 1, agree, compute, fetch 2, read, agree, compute, fetch 3, read, agree, compute, read, "
            "agree, compute"  # the evaluation at the end
        )


def reads_a_bad_disk(config: Train) -> int:
    """The last rank cannot read its tokens of step 3."""
    step = Loader.step

    def read_or_fail(self: Loader, number: int) -> Any:
        if number == 2 and dist.get_rank() == dist.get_world_size() - 1:
            raise DataError("the text cannot be read: Input/output error; copy it anew")
        return step(self, number)

    Loader.step = read_or_fail  # type: ignore[method-assign]
    return train.work(config)


def test_a_part_that_cannot_be_read_ends_the_run_when_its_own_step_begins(text: str, tmp_path: Path) -> None:
    config = small(text, tmp_path, checkpoint_every_steps=2)
    with pytest.raises(DataError, match="the text cannot be read"):
        launch.run(f"{__name__}:reads_a_bad_disk", config, 2)
    assert column(records(config), "step") == [1, 2]
    assert (tmp_path / "train-001" / "checkpoints" / "step-000002").is_dir()


def test_a_run_in_two_halves_is_the_whole_run_bit_by_bit(text: str, tmp_path: Path) -> None:
    config = small(text, tmp_path, steps=4, decay_steps=4, rows_per_step=2, micro_batches=2, ulysses=1)
    whole = run(replace(config, run="whole"))
    run(replace(config, run="half", steps=2))
    halves = run(replace(config, run="half", resume="half"))
    for name in ("step", "loss", "grad_norm", "learning_rate"):
        assert column(halves, name) == column(whole, name)


def notes_the_switches(config: Train) -> int:
    """Train, and write what is switched on where each rank reads its first loss."""
    read = train._read

    def note_and_read(*args: Any) -> Any:
        switches = [torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")]
        Path(config.runs_folder, f"{config.run}{dist.get_rank()}").write_text(json.dumps(switches))
        return read(*args)

    train._read = note_and_read
    return train.work(config)


@pytest.mark.long
def test_deterministic_switches_on_what_pytorch_has_and_changes_no_bit_on_a_cpu(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    config = small(text, tmp_path, steps=3, rows_per_step=2, micro_batches=2, zero=2, recompute="selective", head_chunks=2)
    plain = run(replace(config, run="plain"), f"{__name__}:notes_the_switches")
    exact = run(replace(config, run="exact", deterministic=True), f"{__name__}:notes_the_switches")
    for rank in range(2):
        assert json.loads((tmp_path / f"plain{rank}").read_text()) == [False, None]
        assert json.loads((tmp_path / f"exact{rank}").read_text()) == [True, ":4096:8"]
    for name in ("loss", "grad_norm"):
        assert column(exact, name) == column(plain, name)
