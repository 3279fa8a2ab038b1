"""The loss of a model over all ranks: which losses are recognised, and which labels refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from longspan import BatchError, ModelError, ParallelMesh, parallel_state, parallelize, shard_batch, unparallelize
from longspan.batch.labels import IGNORE
from tests.helpers.encoder_decoders import build_pair
from tests.helpers.hf_models import build
from tests.helpers.ranks import Ranks, mesh_of


def test_labels_cut_for_another_kind_of_model_are_refused() -> None:
    mesh, ids = ParallelMesh(), torch.ones(1, 8, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    model = parallelize(build("llama"), mesh)
    with pytest.raises(ModelError, match="shift=True"):
        model(**shard_batch(batch, mesh, shift=False))
    model = parallelize(build("modernbert"), mesh)
    with pytest.raises(ModelError, match="shift=False"):
        model(**shard_batch(batch, mesh))
    model = parallelize(build("bert"), mesh)
    with pytest.raises(ModelError, match="shift=False"):
        model(**shard_batch(batch, mesh))


class Smoothed(transformers.BertForMaskedLM):
    """Its loss is its own, and not the plain cross-entropy."""

    def forward(self, labels: Tensor | None = None, **given: Any) -> Any:
        output = super().forward(**given)
        if labels is not None:
            output.loss = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
        return output


def test_a_loss_that_only_the_model_knows_is_refused() -> None:
    mesh, ids = ParallelMesh(), torch.ones(1, 8, dtype=torch.long)
    model = parallelize(Smoothed(build("bert").config), mesh)
    with pytest.raises(ModelError, match="computes its loss from labels by itself"):
        model(**shard_batch({"input_ids": ids, "labels": ids}, mesh, shift=False))


class OfPadding(transformers.BartForConditionalGeneration):
    """Learns nothing from padding, by its id: a loss of its own."""

    def forward(self, labels: Tensor | None = None, **given: Any) -> Any:
        output = super().forward(**given)
        if labels is not None:
            loss = torch.nn.CrossEntropyLoss(ignore_index=self.config.pad_token_id)
            output.loss = loss(output.logits.flatten(0, 1), labels.where(labels != IGNORE, self.config.pad_token_id).flatten())
        return output


def test_labels_that_a_module_around_the_model_takes_are_refused() -> None:
    whole, ids = build("llama"), torch.ones(1, 8, dtype=torch.long)
    parallelize(whole.model, mesh := ParallelMesh())
    with pytest.raises(ModelError, match="shift_labels reached LlamaModel without labels: a module around it has taken those"):
        whole(**shard_batch({"input_ids": ids, "labels": ids}, mesh))
    whole(**shard_batch({"input_ids": ids}, mesh))


def test_a_loss_that_ignores_padding_by_its_id_is_not_the_plain_one(pool: Callable[[int], Ranks]) -> None:
    assert pool(1).run(kind_of_loss) == [None]


def kind_of_loss() -> str | None:
    state: Any = parallel_state(parallelize(OfPadding(build_pair("bart").config), mesh_of()))
    kind: str | None = state.adapter.loss_kind
    return kind


def test_labels_that_the_head_does_not_know_are_refused_on_every_rank(pool: Callable[[int], Ranks]) -> None:
    for message in pool(2).run(unknown_labels):
        assert "the step holds label 5, and BertForTokenClassification tells 0 to 2 apart" in message


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
