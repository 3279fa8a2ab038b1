"""Ids are those of the library that made the tokenizer, text comes back, and what is no tokenizer is refused by name."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as library
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from longspan.data.tokenizers import load as load_tokenizer
from longspan.errors import DataError

LEGAL = r"legal are 'bytes', .*JSON file, and (the|a) folder .*"
TEXT = "def longspan():\n    return 'über ∞'  # <|endoftext|>\n"


def trained(*specials: str) -> Any:
    backend = library.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(specials), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([TEXT] * 3, trainer)
    return backend


def saved(backend: Any, path: Path) -> Path:
    backend.save(str(path))
    return path


def refusal(name: object) -> str:
    with pytest.raises(DataError) as caught:
        load_tokenizer(str(name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bytes_are_ids_and_come_back() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eos) == ("bytes", 257, 256)
    assert tokenizer.encode(TEXT).tolist() == list(TEXT.encode())
    assert tokenizer.encode(b"\xff\x00").tolist() == [255, 0]
    assert tokenizer.decode([*TEXT.encode(), 256]) == TEXT
    assert tokenizer.decode(np.array([97, 256, 255])) == "a\ufffd"
    assert [ids.tolist() for ids in tokenizer.encode_batch([b"a", b"", b"bc"])] == [[97], [], [98, 99]]


def test_a_file_gives_the_ids_of_its_library_never_cut_or_padded(tmp_path: Path) -> None:
    backend = trained("<|endoftext|>")
    backend.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    expected = backend.encode(TEXT, add_special_tokens=False).ids
    backend.enable_truncation(3)
    backend.enable_padding(length=999)
    tokenizer = load_tokenizer(str(saved(backend, tmp_path / "t.json")))
    assert tokenizer.encode(TEXT).tolist() == tokenizer.encode(TEXT.encode()).tolist() == expected
    assert [ids.tolist() for ids in tokenizer.encode_batch([TEXT.encode(), b""])] == [expected, []]
    assert tokenizer.eos == 0
    assert tokenizer.vocab_size == backend.get_vocab_size()
    plain = TEXT.replace("<|endoftext|>", "")
    assert tokenizer.decode([*tokenizer.encode(plain).tolist(), 0]) == plain
    assert tokenizer.decode(tokenizer.encode(b"a\xff")) == "a\ufffd"


def test_a_file_without_an_end_of_document_gets_one_behind_its_vocabulary(tmp_path: Path) -> None:
    backend = trained()
    tokenizer = load_tokenizer(str(saved(backend, tmp_path / "t.json")))
    assert tokenizer.eos == backend.get_vocab_size()
    assert tokenizer.vocab_size == backend.get_vocab_size() + 1
    assert tokenizer.decode([*tokenizer.encode(TEXT).tolist(), tokenizer.eos]) == TEXT


def test_the_fingerprint_is_one_of_content(tmp_path: Path) -> None:
    one, same, other = (
        load_tokenizer(str(saved(trained(*specials), tmp_path / name))).fingerprint
        for name, specials in {"a.json": ("</s>",), "b.json": ("</s>",), "c.json": ("</s>", "<pad>")}.items()
    )
    assert one == same != other


def test_a_folder_is_what_transformers_reads_from_it(tmp_path: Path) -> None:
    path = saved(trained("<a>", "<end>"), tmp_path / "t.json")
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<end>").save_pretrained(tmp_path / "folder")
    tokenizer = load_tokenizer(str(tmp_path / "folder"))
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert tokenizer.encode(TEXT).tolist() == oracle.encode(TEXT, add_special_tokens=False)
    assert (tokenizer.eos, tokenizer.vocab_size) == (oracle.eos_token_id, len(oracle)) == (1, 300)
    assert tokenizer.decode([*tokenizer.encode(TEXT).tolist(), 1]) == TEXT


def test_a_folder_of_a_tokenizer_in_plain_python(tmp_path: Path) -> None:
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode_batch([TEXT.encode()])[0].tolist() == [3 + byte for byte in TEXT.encode()]
    assert tokenizer.eos == 1
    assert tokenizer.vocab_size >= 259
    assert tokenizer.decode([*tokenizer.encode(TEXT).tolist(), 1]) == TEXT
    assert tokenizer.fingerprint == load_tokenizer(str(tmp_path)).fingerprint


def test_refusals_name_what_is_legal(tmp_path: Path) -> None:
    assert re.fullmatch(rf"the tokenizer 'gpt2' is unknown; {LEGAL}", refusal("gpt2"))
    (tmp_path / "a.json").write_text('{"no": "tokenizer"}')
    message = refusal(tmp_path / "a.json")
    assert re.fullmatch(rf"the tokenizer '.*a\.json' is not a file of the tokenizers library: .+; {LEGAL}", message)
    assert re.fullmatch(rf"the folder '.*' holds no Hugging Face tokenizer: .+; {LEGAL}", refusal(tmp_path))


def test_refusals_without_the_libraries_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(trained(), tmp_path / "t.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert refusal(path).endswith("needs tokenizers, which is not installed; pip install '.[hf]' in a checkout")
    assert refusal(tmp_path).endswith("needs transformers, which is not installed; pip install '.[hf]' in a checkout")
