"""The published formulas, each compared with the number that its paper states by ``==``."""

from fractions import Fraction

import pytest

from longspan.planner import closed_forms as forms
from tests.planner import published_formulas as published


def test_ulysses_sends_a_pth_of_megatron_and_is_constant_when_tokens_and_ranks_grow_together() -> None:
    assert forms.ulysses_elements(8192, 4096, 8) == Fraction(4 * 8192 * 4096, 8)
    assert forms.ulysses_elements(16_384, 4096, 16) == forms.ulysses_elements(8192, 4096, 8)
    assert forms.megatron_elements(8192, 4096) == 4 * 8192 * 4096
    assert forms.megatron_elements(8192, 4096) == 8 * forms.ulysses_elements(8192, 4096, 8)


def test_an_all_to_all_of_finite_p_sends_m_times_p_minus_1_over_p_squared() -> None:
    whole = 3 * 8192 * 4096
    assert forms.all_to_all_sent(Fraction(whole, 8), 8) == Fraction(whole * 7, 64)


def test_loongtrain_counts_replicated_keys_and_values() -> None:
    few = published.loongtrain_kv_elements(4096, 1024, heads=32, kv_heads=4, ulysses=8, ranks=16)
    assert few == Fraction(8 * 4 * 4096 * 1024, 32 * 16)
    assert published.loongtrain_kv_elements(4096, 1024, 32, 16, 8, 16) == 2 * few


@pytest.mark.parametrize(
    ("strategy", "parameters", "activations"),
    [("ulysses", 12, Fraction(8, 4)), ("ring", 12, 4), ("data", 12, 0), ("zero1", 12, 0), ("usp_zero3", 18, 4),
     ("tensor", 0, 8), ("tensor_sequence", 0, 10)],
)  # fmt: skip
def test_table_2_of_usp(strategy: str, parameters: int, activations: Fraction) -> None:
    d, tokens, rows, ranks = 512, 2048, 3, 4
    expected = (parameters * d * d, activations * rows * tokens * d)
    assert published.usp_elements(strategy, hidden=d, tokens=tokens, rows=rows, ranks=ranks) == expected


def test_grouped_queries_shrink_the_keys_and_values_of_ulysses() -> None:
    plain = published.usp_grouped_ulysses(hidden=64, tokens=128, rows=1, ranks=4, groups=1)
    assert plain == Fraction(8, 4) * 128 * 64
    assert published.usp_grouped_ulysses(hidden=64, tokens=128, rows=1, ranks=4, groups=4) == plain * Fraction(5, 8)


@pytest.mark.parametrize(
    ("method", "factor"),
    [("none", 34 + Fraction(5 * 64 * 2048, 6144)), ("tensor", 10 + 3 + Fraction(5 * 64 * 2048, 6144 * 8)),
     ("tensor+sequence", Fraction(34, 8) + Fraction(5 * 64 * 2048, 6144 * 8)), ("tensor+selective", 10 + 3),
     ("tensor+sequence+selective", Fraction(34, 8)), ("full", 2)],
)  # fmt: skip
def test_the_activations_of_korthikanti(method: str, factor: Fraction) -> None:
    found = published.korthikanti_bytes(method, tokens=2048, rows=4, hidden=6144, heads=64, tensor=8)
    assert found == 2048 * 4 * 6144 * factor


def test_interleaving_keeps_more_of_the_first_stage() -> None:
    assert forms.interleaved_factor(Fraction(8), 3) == 1 + Fraction(7, 24)


def test_the_bytes_of_alst() -> None:
    checkpoints = published.alst_checkpoint_bytes(layers=32, tokens=125_000, ranks=1, hidden=4096)
    assert checkpoints == 32 * 125_000 * 4096 * 2
    assert round(checkpoints / 2**30, 1) == 30.5  # the paper's own figure
    assert published.alst_checkpoint_bytes(layers=80, tokens=10**6, ranks=4, hidden=8192) / 2**30 == pytest.approx(305, abs=1)
    assert published.alst_logit_bytes(tokens=16_000, ranks=8, vocab=128_256) == 4 * 2000 * 128_256
    assert published.ALST_STATE_BYTES == 18
