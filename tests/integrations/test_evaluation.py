"""Evaluation, prediction and what is logged of LongTrainer against stock Trainer on one rank with the equal global batch.

The matrix: data sets with and without a length x remainders x batches without labels x metrics of logits or of preprocessed
logits x metrics a batch or at the end x zero 0 and 3 x 2 and 4 ranks. Every 12th case always runs, all with ``-m long``.
"""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from longspan import BatchError, MemoryOptions
from longspan.batch.labels import IGNORE
from longspan.integrations.predictions import is_token_wise
from tests.helpers.trainers import (
    HYBRID,
    Logged,
    Pool,
    assert_equal,
    assert_lines_equal,
    build,
    logged,
    pad_left,
    train,
)

TOKENS = 12


class Case(NamedTuple):
    stream: bool
    rows: int
    unlabelled: bool
    metrics: str
    by_batch: bool
    zero: int
    ranks: int


METRICS = ("none", "logits", "argmax", "shifted")
"""Of the evaluation: none, of the logits, of a token-wise function of them, of one that needs neighbouring tokens."""
MATRIX = [
    Case(*case)
    for case in product((False, True), (8, 11), (False, True), METRICS, (False, True), (0, 3), (2, 4))
    if case[3] != "none" or not case[4]
]
LAYOUTS = {2: {"ulysses": 2}, 4: {"ulysses": 2}}


class Stream(IterableDataset[dict[str, Tensor]]):
    """A data set without a length."""

    def __init__(self, rows: list[dict[str, Tensor]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.rows)


def rows(count: int, unlabelled: bool, tokens: int | None = TOKENS) -> list[dict[str, Tensor]]:
    """Rows, of equal length or not; with ``unlabelled`` the second batch of 4 has no label."""
    random = torch.Generator().manual_seed(2)
    found = []
    for number in range(count):
        length = tokens or int(torch.randint(6, 24, (), generator=random))
        ids = torch.randint(3, 97, (length,), generator=random)
        labels = ids.clone()
        labels[: number % 3] = IGNORE
        if unlabelled and 4 <= number < 8:
            labels[:] = IGNORE
        found.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return found


def argmax(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(-1)


def shifted(logits: Tensor, labels: Tensor) -> Tensor:
    """Not token-wise: the prediction stands beside the token that it predicts."""
    return torch.cat([torch.zeros_like(labels[:, :1]), logits.argmax(-1)[:, :-1]], 1)


def summary(given: Any) -> dict[str, float]:
    """Numbers that tell rows and tokens apart, of labelled tokens only."""
    predicted, labels = torch.as_tensor(given.predictions).double(), torch.as_tensor(given.label_ids)
    values = predicted.pow(2).sum(-1) if predicted.ndim == 3 else predicted
    wanted = labels != IGNORE
    places = wanted.cumsum(1) * torch.arange(1, len(labels) + 1).unsqueeze(1)
    total = (values * places)[wanted].sum() / places[wanted].sum().clamp(min=1)
    return {"weighed": float(total), "rows": float(len(labels))}


class ByBatch:
    """Sums up over batches, as ``batch_eval_metrics`` calls for."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def __call__(self, given: Any, compute_result: bool = False) -> dict[str, float]:
        self.seen.append(summary(given))
        if not compute_result:
            return {}
        return {f"batch_{number}_{name}": x for number, one in enumerate(self.seen) for name, x in one.items()}


def evaluate(folder: Path, case: Case, mesh: dict[str, int] | None, batch: int) -> tuple[Logged, Any]:
    """What an evaluation, and a prediction, logs and returns; ``batch`` rows a device or a data replica."""
    data: Any = rows(case.rows, case.unlabelled)
    given: dict[str, Any] = {"eval_dataset": Stream(data) if case.stream else data}
    if case.metrics != "none":
        given["compute_metrics"] = ByBatch() if case.by_batch else summary
        given["preprocess_logits_for_metrics"] = {"argmax": argmax, "shifted": shifted}.get(case.metrics)
    settings = {"batch_eval_metrics": case.by_batch, "logging_nan_inf_filter": case.rows == 8}
    trainer = build(folder, batch, mesh, settings, given, case.zero)
    trainer.evaluate()
    if case.by_batch:
        trainer.compute_metrics.seen.clear()
    predicted = trainer.predict(given["eval_dataset"])
    metrics = {
        name: x for name, x in predicted.metrics.items() if not any(t in name for t in ("runtime", "per_second", "time"))
    }
    lines = [{name: x for name, x in line.items() if "preparation" not in name} for line in logged(trainer)]
    arrays = None if case.by_batch and predicted.predictions is None else (predicted.predictions, predicted.label_ids)
    return [*lines, metrics], arrays


def check(case: Case, pool: Pool, folder: Path) -> None:
    (lines, arrays) = pool(1).run(evaluate, folder, case, None, 4)[0]
    replicas = case.ranks // LAYOUTS[case.ranks]["ulysses"]
    for their_lines, their_arrays in pool(case.ranks).run(evaluate, folder, case, LAYOUTS[case.ranks], 4 // replicas):
        assert_lines_equal(lines, their_lines)
        assert (arrays is None) is (their_arrays is None)
        for one, other in zip(arrays or (), their_arrays or ()):
            torch.testing.assert_close(torch.as_tensor(other), torch.as_tensor(one), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", range(0, len(MATRIX), 12))
def test_evaluation_and_prediction_are_those_of_stock(number: int, pool: Pool, tmp_path: Path) -> None:
    check(MATRIX[(number * 7 + number // 12) % len(MATRIX)], pool, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("case", MATRIX, ids=lambda case: "-".join(map(str, case)))
def test_the_whole_matrix(case: Case, pool: Pool, tmp_path: Path) -> None:
    check(case, pool, tmp_path)


def unlabelled_steps(folder: Path, batch: int, mesh: dict[str, int] | None, zero: int, unfiltered: bool) -> Any:
    """Four steps, of which the second has no label, and one micro-batch of the third."""
    data = [{name: x.clone() for name, x in row.items()} for row in rows(32, False)]
    for number in (*range(8, 16), *range(16, 20)):
        data[number]["labels"][:] = IGNORE
    given = {"train_dataset": Stream(data)}
    settings = {"max_steps": 4, "gradient_accumulation_steps": 2, "logging_nan_inf_filter": not unfiltered}
    return train(folder, batch, mesh, settings, given, zero)


@pytest.mark.parametrize(("zero", "unfiltered"), [(0, True), (3, False)])
def test_a_training_step_without_labels_is_that_of_stock(zero: int, unfiltered: bool, pool: Pool, tmp_path: Path) -> None:
    """Its loss is nan, which Trainer leaves out of the mean that it logs; its gradients are zero."""
    (alone,) = pool(1).run(unlabelled_steps, tmp_path, 4, None, 0, unfiltered)
    assert any(line.get("loss") != line.get("loss") for line in alone[0]) is unfiltered
    for theirs in pool(4).run(unlabelled_steps, tmp_path, 2, HYBRID, zero, unfiltered):
        assert_equal(alone, theirs)


def chunked(folder: Path, mesh: dict[str, int] | None, batch: int) -> Any:
    """Metrics of logits that a chunked loss never forms."""
    given: dict[str, Any] = {"eval_dataset": rows(11, True), "compute_metrics": summary}
    given |= {} if mesh is None else {"memory": MemoryOptions(chunked_loss=True)}
    trainer = build(folder, batch, mesh, {}, given)
    return [trainer.evaluate()[name] for name in ("eval_loss", "eval_weighed", "eval_rows")]


def test_predictions_beside_a_chunked_loss_are_those_of_stock(pool: Pool, tmp_path: Path) -> None:
    (alone,) = pool(1).run(chunked, tmp_path, None, 4)
    for theirs in pool(2).run(chunked, tmp_path, {"ulysses": 2}, 4):
        assert theirs == pytest.approx(alone, rel=1e-5, nan_ok=True)


def of_other_labels(folder: Path, mesh: dict[str, int] | None) -> Any:
    """Stock counts the loss among the predictions where ``label_names`` name no tensor of the batch."""
    trainer = build(folder, 4, mesh, {"label_names": ["other"]}, {})
    if mesh is None:
        return len(trainer.predict(rows(4, False)).predictions)
    with pytest.raises(BatchError, match=r"output 'loss' has no dim of tokens .* leave it out with ignore_keys"):
        trainer.predict(rows(4, False))
    return trainer.predict(rows(4, False), ignore_keys=["loss"]).predictions.shape


def test_a_loss_among_the_predictions_is_refused(pool: Pool, tmp_path: Path) -> None:
    assert pool(1).run(of_other_labels, tmp_path, None) == [2]
    assert pool(2).run(of_other_labels, tmp_path, {"ulysses": 2}) == [(4, TOKENS, 97)] * 2


def shapes_seen(folder: Path, function: Callable[[Tensor, Tensor], Tensor]) -> list[tuple[int, ...]]:
    """The shapes of logits that a function is given in an evaluation of a batch of 2 rows on 2 ranks."""
    seen: list[tuple[int, ...]] = []

    def record(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(tuple(logits.shape))
        return function(logits, labels)

    given = {"eval_dataset": rows(2, False), "compute_metrics": summary, "preprocess_logits_for_metrics": record}
    build(folder, 2, {"ulysses": 2}, {}, given).evaluate()
    return seen


def test_a_token_wise_function_is_never_given_the_logits_of_other_ranks(pool: Pool, tmp_path: Path) -> None:
    for seen in pool(2).run(shapes_seen, tmp_path, argmax):
        assert seen[-1] == (2, TOKENS // 2, 97)
        assert (2, TOKENS, 97) not in seen
    for seen in pool(2).run(shapes_seen, tmp_path, shifted):
        assert seen[-1] == (2, TOKENS, 97)


def label_log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)


FUNCTIONS: dict[str, tuple[Callable[[Any, Any], Any], bool]] = {
    "argmax": (argmax, True),
    "top-k of the first output": (lambda logits, labels: logits.topk(3).indices, True),
    "log-probability of the label": (label_log_probability, True),
    "two results": (lambda logits, labels: (logits.argmax(-1), logits.amax(-1)), True),
    "shifted": (shifted, False),
    "one token less": (lambda logits, labels: logits.argmax(-1)[:, :-1], False),
    "mean over tokens": (lambda logits, labels: logits.argmax(-1) - logits.mean(), False),
    "mean over rows": (lambda logits, labels: logits.argmax(-1) - logits.mean(0).sum(-1), False),
    "a number": (lambda logits, labels: logits.mean(), False),
    "an array": (lambda logits, labels: logits.argmax(-1).numpy(), False),
    "an error": (lambda logits, labels: logits.nothing, False),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_known_to_be_token_wise_or_taken_for_one_that_is_not(name: str) -> None:
    function, expected = FUNCTIONS[name]
    assert is_token_wise(function, torch.zeros(1, 5, 97), torch.zeros(1, 5, dtype=torch.long)) is expected


def accuracy(given: Any) -> dict[str, float]:
    """Of every logit of every row: the part of the tokens that are right, and a sum that tells rows and tokens apart."""
    predicted, labels = given.predictions[:, :-1], given.label_ids[:, 1:]
    right = (predicted.argmax(-1) == labels)[labels != IGNORE]
    there = torch.tensor(labels) != IGNORE
    places = there.cumsum(1) * torch.arange(1, len(there) + 1).unsqueeze(1)
    weighed = (torch.tensor(predicted).double().pow(2).sum(-1) * places)[there].sum() / places[there].sum()
    return {"accuracy": float(right.mean()), "weighed": float(weighed), "rows": float(len(labels))}


WITH_EVALUATION = {
    "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "include_num_input_tokens_seen": "non_padding",
    "train_sampling_strategy": "group_by_length", "activation_checkpointing": True,
}  # fmt: skip


def test_evaluation_between_steps_of_training_is_that_of_one_device(pool: Pool, tmp_path: Path) -> None:
    """11 rows in batches of 4: Trainer's eval_loss weighs the mean of each batch by its rows, and so does this one."""
    given = {"compute_metrics": accuracy, "data_collator": pad_left}
    (alone,) = pool(1).run(train, tmp_path / "one", 4, None, WITH_EVALUATION, given)
    evaluated = [line for line in alone[0] if "eval_loss" in line]
    assert [line["eval_rows"] for line in evaluated] == [11, 11]
    assert alone[0][-1]["num_input_tokens_seen"] > 0
    for theirs in pool(4).run(train, tmp_path / "four", 2, HYBRID, WITH_EVALUATION, given):
        assert_equal(alone, theirs)
    for theirs in pool(4).run(train, tmp_path / "ring", 1, {"ring": 1}, WITH_EVALUATION, given, 3, True):  # four replicas
        assert_equal(alone, theirs)
    settings = {name: x for name, x in WITH_EVALUATION.items() if "checkpointing" not in name}
    for theirs in pool(4).run(train, tmp_path / "tensor", 2, {"tensor": 2}, settings, given):
        assert_equal(alone, theirs)
