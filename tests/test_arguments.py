"""docs/arguments.md has a verdict for every argument of longspan, of Transformers' models and configs, and of its Trainer."""

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import TrainingArguments
from transformers.models.auto import modeling_auto as auto

import longspan
from longspan import hf
from longspan.hf.call_checks import MEDIA, WHOLE_SEQUENCE
from longspan.hf.names import is_dropout_field
from longspan.integrations.arguments import REMEDIES
from longspan.integrations.trainer import LongTrainer

PAGE = Path(__file__).parents[1] / "docs" / "arguments.md"
MODELS = Path(transformers.__file__).parent / "models"
TESTED = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss", "phi3", "mixtral", "qwen3_moe", "deepseek_v3",
    "olmo2", "starcoder2", "gpt_neox", "gpt2", "opt", "bert", "roberta", "modernbert", "gptj", "bloom", "mpt", "falcon",
    "gpt_neo", "openai", "megatron_bert", "stablelm", "diffllama", "bart", "mbart", "plbart", "pegasus", "marian", "t5",
    "mt5", "umt5", "t5gemma", "m2m_100", "qwen2_vl", "cohere", "granite",
)  # fmt: skip
PARTS = ("Attention", "Router", "MoE", "Moe", "Experts", "Gate")
"""Parts of the names of the classes of Transformers that attend or route."""
PINNED = transformers.__version__.startswith("5.23.")
"""Whether this is the Transformers of constraints.txt, of which no name that the tables have is missing."""
NEWER = {"encoder_cache"}
"""Keywords that came after it; 5.24 calls ``past_key_values`` and ``cache_params`` by the name ``cache`` too."""
MASKS = ("Window", "Documents", "Chunked", "PrefixLM", "SinkTokens", "Span", "BlockSparse")


def rows(section: str) -> list[list[str]]:
    """The cells of the table under a heading of the page, without its two first lines."""
    text = PAGE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines[2:]]


def verdicts(section: str) -> dict[str, str]:
    """The verdict of each name in a table; a name stands in it once."""
    found: dict[str, str] = {}
    for names, verdict, how in rows(section):
        assert verdict in ("honoured", "refused", "irrelevant"), verdict
        assert how, names
        for name in names.split(", "):
            assert name not in found, f"{name} stands twice under {section}"
            found[name] = verdict
    return found


def refused(section: str) -> set[str]:
    return {name for name, verdict in verdicts(section).items() if verdict == "refused"}


def callables() -> Iterator[tuple[str, Callable[..., Any]]]:
    """longspan's public functions, and the classes that a user makes with arguments."""
    for name in longspan.__all__:
        public = getattr(longspan, name)
        if inspect.isfunction(public) or name in ("ParallelMesh", "MemoryOptions", "AutoMemory"):
            yield name, public
    yield "ParallelMesh.from_device_mesh", longspan.ParallelMesh.from_device_mesh
    yield "LongTrainer", LongTrainer.__init__
    yield "hf.load", hf.load
    yield "hf.save", hf.save


@pytest.mark.parametrize(("name", "public"), list(callables()))
def test_every_public_argument_has_a_verdict(name: str, public: Callable[..., Any]) -> None:
    named = {of: set(arguments.split(", ")) for of, arguments, *_ in rows("Public arguments")}
    assert named[name] == set(inspect.signature(public).parameters) - {"self"}


def test_every_argument_of_a_mask_has_a_verdict() -> None:
    named = {of: set(arguments.split(", ")) for of, arguments, *_ in rows("Public arguments")}
    assert named[", ".join(MASKS)] == {name for mask in MASKS for name in inspect.signature(getattr(longspan, mask)).parameters}


def test_every_field_of_training_arguments_has_a_verdict() -> None:
    names = {field.name for field in fields(TrainingArguments)}
    assert set(verdicts("`TrainingArguments`")) == names
    own_names_of_compile = {"torch_compile_backend", "torch_compile_mode"}  # each sets torch_compile
    assert refused("`TrainingArguments`") == (set(REMEDIES) & names) | own_names_of_compile


def test_a_backend_alone_compiles(tmp_path: Path) -> None:
    assert TrainingArguments(str(tmp_path), torch_compile_backend="eager", use_cpu=True).torch_compile


def classes_of(folder: str, wanted: Callable[[str], bool]) -> Iterator[ast.ClassDef]:
    """The classes with a wanted name in the modeling files of the folders that match ``folder``; nothing else is parsed."""
    for path in MODELS.glob(f"{folder}/modeling_*.py"):
        for piece in re.split(r"(?m)^(?=[^\s#)\]}])", path.read_text()):
            if (name := re.match(r"class (\w+)", piece)) and wanted(name[1]):
                (found,) = ast.parse(piece).body
                assert isinstance(found, ast.ClassDef)
                yield found


def forwards(kind: ast.ClassDef) -> list[ast.FunctionDef]:
    return [node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name == "forward"]


def is_read(name: str) -> bool:
    return "For" in name or any(part in name for part in PARTS)


def test_every_keyword_of_a_language_model_has_a_verdict() -> None:
    tables = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )  # fmt: skip
    listed = [name for table in tables for name in table.values()]
    names = {each for name in listed for each in (name if isinstance(name, tuple | list) else (name,))}
    found = set()
    for kind in classes_of("*", names.__contains__):
        for forward in forwards(kind):
            found |= {argument.arg for argument in (*forward.args.args[1:], *forward.args.kwonlyargs)}
    named = verdicts("Keywords of `model(...)`")
    assert len(found) > 50
    assert found <= set(named), found - set(named)
    assert not PINNED or set(named) - found == NEWER
    by_shard_batch = {
        name for names, verdict, how in rows("Keywords of `model(...)`") if verdict == "refused" and "`shard_batch`" in how
        for name in names.split(", ")
    }  # fmt: skip
    in_the_call = {*WHOLE_SEQUENCE, *MEDIA} & set(named) - {"attention_mask", "decoder_attention_mask"}
    assert refused("Keywords of `model(...)`") == in_the_call | by_shard_batch


def test_every_config_field_that_attention_routing_or_loss_reads_has_a_verdict() -> None:
    found = set()
    for kind in (kind for folder in TESTED for kind in classes_of(folder, is_read)):
        parts = [kind] if any(part in kind.name for part in PARTS) else forwards(kind)
        for node in (node for part in parts for node in ast.walk(part)):
            if isinstance(node, ast.Attribute) and "config" in (getattr(node.value, "id", ""), getattr(node.value, "attr", "")):
                found |= {node.attr} if not node.attr.startswith("get_") else set()
    named = verdicts("Config fields")
    assert len(found) > 50
    assert found <= set(named), found - set(named)
    assert not PINNED or found == set(named), set(named) - found
    assert all(is_dropout_field(name) or name == "router_jitter_noise" for name in named if "drop" in name or "jitter" in name)
