"""docs/glossary.md explains every technical term and every flag of the command line's help texts."""

import re
from pathlib import Path

import pytest

from longspan.cli.main import VERBS, main

GLOSSARY = (Path(__file__).parents[1] / "docs" / "glossary.md").read_text().lower()

TERMS = """
    all-to-all, attention, axes, backward, bf16, bits, block, bound, byte frequencies, checkpoint, chunk, clip,
    compute dtype, context length, context parallelism, cosine, data replica, decoder, degree, epoch, evaluation,
    feed-forward, forward, fp32, fp64, fsdp2, global batch, global gradient norm, gradient norm, guarantee, head,
    held-out, holds, host, kernel, key/value, launcher, layer, layout, learning rate, logits, mask, micro-batch,
    nats, norm, offload, one device, optimizer states, optimizer step, packing, parameters, perplexity, prefetch,
    preset, query head, rank, recompute, replica, resume, ring attention, rope, row, selective, sequence parallel, shard,
    tensor parallel, pipeline parallel, tile, token, tokenizer, torchrun, traffic, ulysses, warm-up, weight decay,
    window, zero stage
"""
"""Technical terms that a help text may use. A term that no help text uses needs no entry."""

PLAIN_FLAGS = """
    --config --data --debug --documents --help --max-tokens --optimizer --rows --seed --text-field --version
"""
"""Flags whose own help line says all; every other flag stands beside its term."""


def test_the_glossary_explains_every_term_and_flag_of_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    missing = []
    for verb in VERBS:
        assert main([verb, "--help"]) == 0
        text = capsys.readouterr().out.lower()
        prose = " ".join(re.sub(r"[^a-z0-9/,.:-]+", " ", text).split())
        used = [term.strip() for term in " ".join(TERMS.split()).split(",") if re.search(rf"\b{term.strip()}s?\b", prose)]
        assert len(used) > (0 if verb in ("report", "probe") else 10), (
            f"{verb} --help has hardly any of the terms: is its text still read?"
        )
        missing += [f"{verb}: {term}" for term in used if not re.search(rf"\b{term}s?\b", GLOSSARY)]
        flags = set(re.findall(r"(?<![\w-])--(?!no-)[a-z][a-z-]*", text)) - set(PLAIN_FLAGS.split())
        missing += [f"{verb}: {flag}" for flag in sorted(flags) if not re.search(rf"`{flag}\b", GLOSSARY)]
    assert not missing, f"docs/glossary.md lacks {missing}"
