"""BatchInfo: the mask of a layer in a step, and what a model refuses of a step."""

import ast
import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from longspan import BatchError, MaskError, parallelize, shard_batch
from longspan.batch import context
from longspan.batch.context import BatchInfo, refuse_unknown_tokens
from longspan.batch.shard import shard_local
from longspan.distributed.coordinate import MeshCoordinate
from longspan.masks.bands import Band
from longspan.masks.constructors import Causal, Documents, Full, Mask, PrefixLM, Span, Window
from tests.helpers.memory_models import model_of
from tests.helpers.ranks import Ranks, mesh_of


def test_a_token_or_label_that_the_model_does_not_know_is_refused_by_every_rank(pool: Callable[[int], Ranks]) -> None:
    first, second = pool(2).run(unknown_tokens)
    assert first == second
    assert first == [
        "the step holds token or label 97, and Decoder knows 0 to 96; use the model's own tokenizer",
        "the step holds token or label 200, and LlamaForCausalLM knows 0 to 96; use the model's own tokenizer",
        "labels holds -1; tokens are 0 or more, and labels too, or -100",
    ]


def unknown_tokens() -> list[str]:
    """Two replicas: the second alone has the token, the label, and what is negative."""
    mesh, texts = mesh_of(1, 1), []
    for name, key, wrong in (("decoder", "input_ids", 97), ("llama", "labels", 200), ("llama", "labels", -1)):
        model = parallelize(model_of(name), mesh)
        batch = {"input_ids": torch.full((1, 9), 5), "labels": torch.full((1, 9), 5)}
        batch[key][0, 4] = wrong if mesh.coordinate.data_rank else 5
        with pytest.raises(BatchError) as error:
            model(**shard_batch(batch, mesh))
        texts.append(str(error.value))
    return texts


def info(**changes: Any) -> BatchInfo:
    """Two rows of eight tokens on one rank, of which the batch says nothing."""
    whole = shard_local({"input_ids": torch.full((2, 8), 5)}, MeshCoordinate())["longspan"]
    return replace(whole, **changes)


def test_a_plain_step_has_the_mask_of_each_layer() -> None:
    assert info().is_plain
    assert info().mask_for(Window(3)) == Window(3)
    for changed in ({"mask": Causal()}, {"padding": (Span(0, 8), Span(1, 8))}, {"restarts": (Documents([8]),) * 2}):
        assert not info(**changed).is_plain


def test_a_layer_s_mask_is_narrowed_by_the_step_s_by_padding_and_by_documents() -> None:
    padding, documents = (Span(0, 8), Span(1, 8)), (Documents([3, 5]), Documents([8]))
    assert info(mask=Window(2)).mask_for(Causal()) == Window(2) & Causal()
    assert info(mask=Causal()).mask_for(Causal()) == Causal()
    assert info(padding=padding).mask_for(Causal()) == tuple(Causal() & real for real in padding)
    each = (Causal(), Window(2))
    step = info(mask=each, documents=documents)
    assert step.mask_for(Causal()) == (Causal() & documents[0], Window(2) & Causal() & documents[1])


def test_restarted_positions_are_documents_only_to_models_that_say_so() -> None:
    step = info(restarts=(Documents([3, 5]), Documents([8])))
    assert step.mask_for(Causal()) == Causal()
    assert step.mask_for(Causal(), restarts=True) == (Causal() & Documents([3, 5]), Causal() & Documents([8]))


@pytest.mark.parametrize("shown", [Full(), PrefixLM(3), Window(2, 2)])
def test_a_mask_that_shows_what_a_causal_layer_hides_is_refused(shown: Mask) -> None:
    with pytest.raises(MaskError, match="lets tokens see later ones, and the model's layers are Causal"):
        info(mask=shown).mask_for(Causal())
    assert info(mask=shown & Causal()).mask_for(Causal()) == shown & Causal() & Causal()
    assert info(mask=shown).mask_for(Full()) == (Full() if shown == Full() else shown & Full())


def test_a_decoder_s_tokens_look_at_the_real_tokens_of_their_own_row() -> None:
    target = replace(info(), tokens=3)
    assert info(target=target).mask_across() == Full()
    across = info(target=target, padding=(Span(0, 8), Span(2, 5))).mask_across()
    assert [mask.bands(3, 8) for mask in across] == [Full().bands(3, 8), (Band(0, 3, 2, 5, 0, 4),)]


def test_a_step_is_compared_with_the_vocabulary_once() -> None:
    refuse_unknown_tokens(info(largest_token_or_label=96), 97, "Decoder")
    refuse_unknown_tokens(info(largest_token_or_label=200), None, "a model without a table of tokens")
    with pytest.raises(BatchError, match="holds token or label 97, and Decoder knows 0 to 96"):
        refuse_unknown_tokens(info(largest_token_or_label=97), 97, "Decoder")


def test_every_field_has_a_docstring_of_its_own() -> None:
    body = next(node for node in ast.parse(inspect.getsource(context)).body if isinstance(node, ast.ClassDef)).body
    described = [
        node.target.id
        for node, after in pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and len(str(after.value.value)) > 20
    ]
    assert described == [field.name for field in fields(BatchInfo)]


def test_fields_are_given_by_name_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        BatchInfo(6, 2)  # type: ignore[call-arg, misc]
