"""Models that count positions from ids are given those of the whole row, or refused on every rank."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor

from longspan import LongspanError, ParallelMesh, parallelize, shard_batch
from tests.helpers.encoder_decoders import COMMON, refused_pair
from tests.helpers.hf_models import build
from tests.helpers.ranks import Ranks

COUNTED_FROM_IDS = {
    "a row too long to be counted": "the step has positions up to 61, and the table of RobertaForMaskedLM has 58 of them",
    "embeddings": "counts its positions from input_ids; with inputs_embeds, give shard_batch position_ids too",
}


@pytest.mark.parametrize("what", COUNTED_FROM_IDS)
def test_rows_that_a_replica_alone_counts_are_refused_on_every_rank(what: str, pool: Callable[[int], Ranks]) -> None:
    for message in pool(2).run(replicas_that_count, what):
        assert COUNTED_FROM_IDS[what] in message


def replicas_that_count(what: str) -> str:
    mesh = ParallelMesh()
    model = parallelize(build("roberta", max_position_embeddings=64), mesh)
    rows: dict[str, Tensor] = {"input_ids": torch.full((1, 8), 7), "position_ids": torch.arange(8).unsqueeze(0)}
    if mesh.coordinate.data_rank == 1:
        embedded = torch.zeros(1, 8, model.config.hidden_size, dtype=torch.float64)
        rows = {"inputs_embeds": embedded} if what == "embeddings" else {"input_ids": torch.full((1, 62), 7)}
    try:
        model(**shard_batch(rows, mesh, shift=False))
    except LongspanError as error:
        return str(error)
    return "nothing was refused"


def test_tables_that_count_ids_are_refused(pool: Callable[[int], Ranks]) -> None:
    names = {"src_vocab_size": 97, "tgt_vocab_size": 97, "langs": ["en", "de"]}
    config = transformers.FSMTConfig(**names, **{name: value for name, value in COMMON.items() if name != "vocab_size"})
    (message,) = pool(1).run(refused_pair, transformers.FSMTForConditionalGeneration(config))
    assert "counts positions in its own way" in message or "does not count its positions" in message
