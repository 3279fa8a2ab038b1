"""The attention that is registered with Transformers: documents of keywords, and dropout refused."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch

from longspan import ModelError, ParallelMesh, parallelize, shard_batch
from longspan.batch.labels import IGNORE
from tests.helpers.hf_models import assert_gradients, build, forward_alone, in_place
from tests.helpers.ranks import Ranks, mesh_of


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_documents_of_varlen_keywords_see_only_themselves(name: str, pool: Callable[[int], Ranks]) -> None:
    pool(2).run(varlen_documents, name)


def varlen_documents(name: str) -> None:
    """One row of three documents, beside the three of them alone on one device."""
    reference, mesh = build(name), mesh_of(2, 1)
    model, encoder, lengths = parallelize(deepcopy(reference), mesh), in_place(reference), (7, 12, 5)
    rows = [torch.randint(3, 97, (1, n), generator=torch.Generator().manual_seed(n)) for n in lengths]
    asked = [n - (not encoder) for n in lengths]
    losses = [forward_alone(reference, {"input_ids": row, "labels": row}, encoder)[0] for row in rows]
    expected = sum(loss * n for loss, n in zip(losses, asked)) / sum(asked)
    expected.backward()
    starts = torch.tensor([0, 7, 19, 24])
    ids, positions = torch.cat(rows, 1), torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    labels = ids if encoder else ids.index_fill(1, starts[1:-1], IGNORE)
    packed = {"input_ids": ids, "labels": labels, "position_ids": positions, "cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    found = model(**shard_batch(packed | {"max_length_q": 12, "max_length_k": 12}, mesh, shift=not encoder)).loss
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    assert_gradients(model, reference, 1e-10)


def test_attention_dropout_is_refused_by_its_field() -> None:
    mesh = ParallelMesh()
    model = parallelize(build("llama", attention_dropout=0.1), mesh)
    part = shard_batch({"input_ids": torch.ones(1, 8, dtype=torch.long)}, mesh)
    with pytest.raises(ModelError, match=r"layers.0.self_attn' asks for attention dropout, .*; set config.attention_dropout"):
        model(**part)
    model.eval()(**part)
