"""Every kind of file gives its texts, in order; every refusal says what was asked, why not, and what is legal."""

import gzip
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from longspan.data import corpora
from longspan.errors import DataError

TEXTS = ["def f():\n    return 1\n", "Grüße, 世界\r\n", "a \u2028 separator that is no end of a line"]
KINDS = r"\.txt, \.md, \.rst, \.py, \.jsonl, \.jsonl\.gz, \.jsonl\.zst or \.parquet"


def as_lines(texts: Iterable[str | None], field: str = "text") -> bytes:
    return b"".join(json.dumps({"id": 1, field: text}).encode() + b"\n" for text in texts)


def zstd(path: Path, content: bytes) -> None:
    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(content)


def table(path: Path, content: bytes) -> None:
    rows = [json.loads(line) for line in content.splitlines()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


WRITERS: dict[str, Callable[[Path, bytes], object]] = {
    ".jsonl": Path.write_bytes,
    ".jsonl.gz": lambda path, content: path.write_bytes(gzip.compress(content)),
    ".jsonl.zst": zstd,
    ".parquet": table,
}


def texts(*sources: object, field: str = "text") -> list[bytes]:
    return [document.text for document in corpora.documents([str(source) for source in sources], field)]


def refusal(*sources: object, field: str = "text") -> str:
    with pytest.raises(DataError) as caught:
        texts(*sources, field=field)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("ending", WRITERS)
def test_every_record_with_text_is_a_document(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{ending}"
    WRITERS[ending](path, as_lines([*TEXTS, "", None, "last"], "body"))
    documents = list(corpora.documents([str(path)], "body"))
    assert [document.text for document in documents] == [text.encode() for text in [*TEXTS, "last"]]
    assert [re.findall(r"\d+$", document.name) for document in documents] == [["1"], ["2"], ["3"], ["6"]]
    assert sorted(document.read for document in documents) == [document.read for document in documents]
    assert documents[-1].read == path.stat().st_size


def test_a_file_of_text_is_a_document_byte_for_byte(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbfline\r\n\xff\xfe\x00 not UTF-8"
    for ending in (".txt", ".md", ".rst", ".py", ".TXT"):
        (tmp_path / f"a{ending}").write_bytes(content)
        assert texts(tmp_path / f"a{ending}") == [content]


def test_half_a_surrogate_pair_in_json_is_text_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "a\\ud800b"}')
    assert texts(tmp_path / "a.jsonl") == [b"a?b"]


def test_a_folder_is_its_texts_by_path_and_a_glob_its_matches(tmp_path: Path) -> None:
    for name in ("b/z.txt", "b/a.py", "b.txt", "a.md", "B/c.txt", ".git/d.txt", "b/.e.txt", "f.png", "empty.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("" if name == "empty.txt" else name)
    assert texts(tmp_path) == [b"B/c.txt", b"a.md", b"b/a.py", b"b/z.txt", b"b.txt"]
    assert texts(f"{tmp_path}/*.txt") == [b"b.txt"]
    assert texts(f"{tmp_path}/**/*.txt") == [b"B/c.txt", b"b.txt", b"b/z.txt"]
    assert texts(f"{tmp_path}/[bB]") == [b"B/c.txt", b"b/a.py", b"b/z.txt"]
    assert texts(f"{tmp_path}/b/**") == [b"b/a.py", b"b/z.txt"]
    assert texts(tmp_path / "b", f"{tmp_path}/b*") == [b"b/a.py", b"b/z.txt", b"b/a.py", b"b/z.txt", b"b.txt"]
    whole, below = corpora.find([str(tmp_path), f"{tmp_path}/b/**"])
    assert corpora.counts(whole.files) == {".txt": 4, ".md": 1, ".py": 1}
    assert corpora.counts(below.files) == {".txt": 1, ".py": 1}  # though "**" meets each twice
    assert corpora.counts(whole.skipped) == {".png": 1}
    (tmp_path / "[b].txt").write_text("a name that looks like a glob")
    assert texts(tmp_path / "[b].txt") == [b"a name that looks like a glob"]


def test_files_of_other_kinds_are_skipped_and_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "b.HTML", "c.html", "d.json", "Makefile", ".hidden.png"):
        (tmp_path / name).write_text("text")
    (found,) = corpora.find([str(tmp_path)])
    assert corpora.counts(found.files) == {".txt": 1}
    assert next(iter(corpora.counts(found.skipped).items())) == (".html", 2)
    assert corpora.counts(found.skipped) == {".html": 2, ".json": 1, "no ending": 1}


def test_bytes_read_add_up_over_sources(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("12345")
    (tmp_path / "b.jsonl").write_bytes(as_lines(["x", "y"]))
    size = (tmp_path / "b.jsonl").stat().st_size
    found = corpora.documents([str(tmp_path / "b.jsonl"), str(tmp_path / "a.txt"), str(tmp_path)])
    reads = [document.read for document in found]
    assert reads[1:4] == [size, size + 5, size + 10]
    assert reads[-1] == 2 * size + 10


def test_the_default_is_the_source_of_the_standard_library() -> None:
    documents = list(corpora.documents([]))
    names = [Path(document.name).name for document in documents]
    assert {"argparse.py", "abc.py", "typing.py"} <= set(names)
    assert sum(len(document.text) for document in documents) > 5_000_000
    assert not [document.name for document in documents if {"test", "tests", "site-packages"} & set(Path(document.name).parts)]
    assert documents == list(corpora.documents([]))


def test_refusals_of_what_is_not_there(tmp_path: Path) -> None:
    assert re.fullmatch(rf"the data '.*/no\.txt' does not exist; name a file, .* {KINDS}", refusal(tmp_path / "no.txt"))
    assert re.fullmatch(rf"the glob '.*\*\.txt' matches nothing; name a file, .* {KINDS}", refusal(f"{tmp_path}/*.txt"))
    assert re.fullmatch(rf"the folder '.*' holds no file of {KINDS}; name another one", refusal(tmp_path))


def test_refusals_of_what_holds_no_text(tmp_path: Path) -> None:
    (tmp_path / "full.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").touch()
    message = r"the data '.*' holds no text: {}, nothing in it; name files that hold some"
    assert re.fullmatch(message.format("1 file"), refusal(tmp_path / "full.txt", tmp_path / "empty" / "a.txt"))
    (tmp_path / "empty" / "b.jsonl").write_bytes(as_lines(["", None]))
    assert re.fullmatch(message.format("2 files"), refusal(tmp_path / "empty"))


def test_refusals_of_unknown_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").touch()
    for source in (tmp_path / "a.pdf", f"{tmp_path}/*"):
        assert re.fullmatch(rf"the file '.*/a\.pdf' is of an unknown kind; legal are {KINDS}", refusal(source))


@pytest.mark.parametrize("ending", WRITERS)
def test_refusals_of_a_missing_field_name_those_that_there_are(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{ending}"
    WRITERS[ending](path, as_lines(["x"], "body"))
    what = "a.parquet has no column" if ending == ".parquet" else f"a{ending}, line 1 has no field"
    assert refusal(path).endswith(f"{what} 'text'; there are id, body: choose with --text-field")
    where = "row 1" if ending == ".parquet" else "line 1"
    assert refusal(path, field="id").endswith(f"{where} holds a int in 'id', not text; choose another one with --text-field")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', "is not valid JSON: Expecting ',' delimiter: line 1 column 13 (char 12); repair the line"),
        (b'{"text": "\xff"}', "is not valid JSON: 'utf-8' codec can't decode byte 0xff"),
        (b'["x"]', "holds a JSON list; it must hold an object with the field 'text'"),
        (b"{}", "has no field 'text'; there is none: choose with --text-field"),
    ],
)
def test_refusals_of_a_line_name_the_file_and_the_line(line: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_lines(["x"]) + b"\n" + line)
    assert f"{tmp_path}/a.jsonl, line 3 {message}" in refusal(tmp_path / "a.jsonl")


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"no such format", lambda content: b""])
def test_refusals_of_damaged_files(ending: str, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / f"a{ending}"
    WRITERS[ending](path, as_lines(TEXTS))
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(path)
    unreadable = re.fullmatch(r"the data '.*' cannot be read: .+; repair it, or leave it out", message)
    assert unreadable or (path.stat().st_size == 0 and "holds no text" in message)


def test_refusals_of_what_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").touch()

    def forbidden(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    assert refusal(tmp_path / "a.txt").endswith("a.txt' cannot be read: Permission denied; repair it, or leave it out")


@pytest.mark.parametrize("ending", [".jsonl.zst", ".parquet"])
def test_refusals_without_pyarrow_say_how_to_get_it(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"a{ending}").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refusal(tmp_path / f"a{ending}").endswith(
        "needs pyarrow, which is not installed; pip install '.[data]' in a checkout"
    )


def test_refusal_of_a_python_without_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    assert re.fullmatch(r"the Python standard library has no source in .*; name files with --data", refusal())
