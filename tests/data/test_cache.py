"""A folder of the cache is whole or not there: after a crash, a full disk, a race, or a change of the data."""

import multiprocessing as mp
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.data import cache, packing
from longspan.data.packing import Corpus, tokenize
from longspan.data.tokenizers import Bytes, Ids
from longspan.errors import DataError


class Counting(Bytes):
    """Bytes that note on the disk, for all processes to see, that they were asked; ``then`` is called after the first batch."""

    def __init__(self, notes: Path, then: Callable[[], object] = bool, fingerprint: str = "bytes") -> None:
        self.notes, self.then, self.fingerprint = notes, then, fingerprint

    def encode_batch(self, texts: Sequence[bytes]) -> list[Ids]:
        with self.notes.open("a") as file:
            file.write("x")
        self.then()
        return super().encode_batch(texts)

    @property
    def asked(self) -> int:
        return self.notes.stat().st_size if self.notes.exists() else 0


@pytest.fixture
def counting(tmp_path: Path) -> Counting:
    return Counting(tmp_path / "notes")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return written(tmp_path / "data" / "a.txt", "the text of a document" * 9)


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def settle(path: Path) -> None:
    """Make a file look as if nobody had touched it for an hour, as far as a user can."""
    os.utime(path, (time.time() - 3600,) * 2)


def kept(folder: Path) -> list[str]:
    """Everything in the cache but the keys: whole folders, and drafts if there were any."""
    return sorted(path.name for path in folder.iterdir() if path.name != "keys")


def start(body: Callable[[], object]) -> Any:
    process = mp.get_context("fork").Process(target=body)
    process.start()
    return process


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_folder_is_that_of_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    corpus = tokenize([str(data)], Bytes())
    assert kept(tmp_path / "xdg" / "longspan") == [corpus.fingerprint]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / ".cache" / "longspan"


def test_the_same_text_is_tokenized_once_wherever_it_lies(tmp_path: Path, data: Path, counting: Counting) -> None:
    copy = written(tmp_path / "copy" / "b.txt", data.read_text())
    corpora = [tokenize([str(source)], counting, folder=tmp_path / "cache") for source in (data, data, copy, data.parent)]
    assert counting.asked == 1
    assert {corpus.fingerprint for corpus in corpora} == set(kept(tmp_path / "cache"))
    assert {corpus.train.fingerprint for corpus in corpora} == {f"{corpora[0].fingerprint} train"}


def test_what_changes_the_tokens_changes_the_name(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(tokenizer: Bytes | None = None, field: str = "text", *sources: Path) -> str:
        asked = [str(source) for source in sources or (data,)]
        return tokenize(asked, tokenizer or Bytes(), text_field=field, folder=tmp_path / "cache").fingerprint

    other, names = written(data.parent / "b.txt", "b"), [name()]
    names += [name(None, "text", data, other), name(None, "text", other, data), name(None, "body")]
    names += [name(Counting(tmp_path / "notes", fingerprint="another"))]
    written(data, data.read_text().replace("t", "d"))  # as long as before
    names += [name()]
    monkeypatch.setattr(packing, "FORMAT", -1)
    names += [name()]
    assert len(set(names)) == len(names)


def test_a_file_that_rests_is_known_by_its_times_and_one_that_changed_just_now_is_not(
    tmp_path: Path, data: Path, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    content = packing._content
    monkeypatch.setattr(packing, "_content", lambda found, made_by: opened.append(found) or content(found, made_by))
    for _ in range(3):
        tokenize([str(data)], counting, folder=tmp_path / "cache")
    assert len(opened) == 3
    monkeypatch.setattr(packing, "SETTLED_SECONDS", -1.0)
    for _ in range(3):
        tokenize([str(data)], counting, folder=tmp_path / "cache")
    assert len(opened) == 4
    before = data.stat()
    written(data, data.read_text().upper())
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))  # the time of its content can be forged, that of its inode not
    changed = tokenize([str(data)], counting, folder=tmp_path / "cache")
    assert bytes(changed.whole.read(0, 8).tolist()) == b"THE TEXT"
    assert counting.asked == 2


@contextmanager
def file_size_limit(bytes_: int) -> Iterator[None]:
    """The kernel refuses to write further, in the middle of a file: what a full disk does, with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def full_disk(*args: object) -> None:
    raise OSError(28, "No space left on device")


CACHE = r"the token cache '.*/cache' cannot be written: {}; make room there, .* another disk with XDG_CACHE_HOME=FOLDER"


@pytest.mark.parametrize("where", ["longspan.data.cache.sync", "os.rename", "numpy.save", "os.fsync"])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(
    where: str, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(where, full_disk)
        with pytest.raises(DataError) as caught:
            tokenize([str(data)], Bytes(), folder=tmp_path / "cache")
    assert re.fullmatch(CACHE.format("No space left on device"), str(caught.value))
    assert kept(tmp_path / "cache") == []
    tokenize([str(data)], Bytes(), folder=tmp_path / "cache")


def test_a_file_that_the_kernel_stops_is_a_sentence_and_leaves_nothing(tmp_path: Path, data: Path) -> None:
    with file_size_limit(100), pytest.raises(DataError) as caught:
        tokenize([str(data)], Bytes(), folder=tmp_path / "cache")
    assert re.fullmatch(CACHE.format("File too large"), str(caught.value))
    assert kept(tmp_path / "cache") == []
    tokenize([str(data)], Bytes(), folder=tmp_path / "cache")


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path, data: Path) -> None:
    written(tmp_path / "cache", "a file is in the way")
    with pytest.raises(DataError) as caught:
        tokenize([str(data)], Bytes(), folder=tmp_path / "cache")
    assert re.fullmatch(CACHE.format("(File exists|Not a directory)"), str(caught.value))


def test_bad_data_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BATCH_BYTES", 1)
    data = written(tmp_path / "a.jsonl", '{"text": "good"}\n{"text": "good"}\nbad')
    with pytest.raises(DataError, match="line 3 is not valid JSON"):
        tokenize([str(data)], Bytes(), folder=tmp_path / "cache")
    assert kept(tmp_path / "cache") == []


def test_data_that_changes_under_the_reader_is_refused(tmp_path: Path, data: Path) -> None:
    tokenizer = Counting(tmp_path / "notes", then=lambda: written(data, "another text"))
    with pytest.raises(DataError, match="the data changed while it was read; run again when nobody writes to it"):
        tokenize([str(data)], tokenizer, folder=tmp_path / "cache")
    assert kept(tmp_path / "cache") == []
    assert tokenize([str(data)], Bytes(), folder=tmp_path / "cache").text_bytes == len("another text")


def test_a_process_that_is_killed_leaves_no_half_cache(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BATCH_BYTES", 1)
    written(data.parent / "b.txt", "the first batch is written, the second never comes")
    asks = Counting(tmp_path / "notes")
    asks.then = lambda: asks.asked == 2 and time.sleep(60)
    process = start(lambda: tokenize([str(data.parent)], asks, folder=tmp_path / "cache"))
    wait_for(lambda: asks.asked == 2)
    process.kill()
    process.join()
    (draft,) = kept(tmp_path / "cache")
    assert draft.startswith(".draft-")
    assert (tmp_path / "cache" / draft / packing.TOKENS).exists()
    other = tokenize([str(data)], Bytes(), folder=tmp_path / "cache")  # another corpus sweeps up what the dead left
    assert kept(tmp_path / "cache") == [other.fingerprint]
    again = tokenize([str(data.parent)], Bytes(), folder=tmp_path / "cache")
    assert kept(tmp_path / "cache") == sorted([other.fingerprint, again.fingerprint])
    assert again.text_bytes == sum(path.stat().st_size for path in data.parent.iterdir())


def test_the_draft_of_the_living_is_not_swept(tmp_path: Path, data: Path) -> None:
    busy = Counting(tmp_path / "notes", then=lambda: wait_for((tmp_path / "go").exists))
    process = start(lambda: tokenize([str(data)], busy, folder=tmp_path / "cache"))
    wait_for(lambda: busy.asked)
    other = tokenize([str(written(data.parent / "b.txt", "other"))], Bytes(), folder=tmp_path / "cache")
    assert len(kept(tmp_path / "cache")) == 2
    (tmp_path / "go").touch()
    process.join()
    assert process.exitcode == 0
    mine = tokenize([str(data)], Bytes(), folder=tmp_path / "cache")
    assert kept(tmp_path / "cache") == sorted([other.fingerprint, mine.fingerprint])


def test_of_many_processes_one_tokenizes_and_all_read_the_same(tmp_path: Path, data: Path) -> None:
    slow = Counting(tmp_path / "notes", then=lambda: time.sleep(0.3))

    def body(rank: int) -> None:
        corpus = tokenize([str(data)], slow, folder=tmp_path / "cache")
        written(tmp_path / "results" / str(rank), corpus.fingerprint + bytes(corpus.whole.read(0, 198).tolist()).decode())

    (tmp_path / "results").mkdir()
    processes = [start(lambda rank=rank: body(rank)) for rank in range(4)]
    for process in processes:
        process.join()
    results = {path.read_text() for path in (tmp_path / "results").iterdir()}
    assert results == {kept(tmp_path / "cache")[0] + data.read_text()}
    assert len(list((tmp_path / "results").iterdir())) == 4
    assert slow.asked == 1


def test_the_same_content_under_two_names_at_once_is_kept_once(tmp_path: Path, data: Path) -> None:
    def meanwhile() -> Corpus:
        return tokenize([str(written(tmp_path / "copy" / "b.txt", data.read_text()))], Bytes(), folder=tmp_path / "cache")

    corpus = tokenize([str(data)], Counting(tmp_path / "notes", then=meanwhile), folder=tmp_path / "cache")
    assert kept(tmp_path / "cache") == [corpus.fingerprint]
    assert bytes(corpus.whole.read(0, 8).tolist()) == b"the text"


@pytest.mark.parametrize("damage", ["tokens.bin", "corpus.json", "train.npy"])
def test_a_damaged_folder_is_refused_by_name(damage: str, tmp_path: Path, data: Path) -> None:
    corpus = tokenize([str(data)], Bytes(), folder=tmp_path / "cache")
    path = tmp_path / "cache" / corpus.fingerprint / damage
    path.write_bytes(path.read_bytes()[: -20 if damage == "tokens.bin" else 0])
    with pytest.raises(DataError) as caught:
        tokenize([str(data)], Bytes(), folder=tmp_path / "cache")
    assert re.fullmatch(r"the cached tokens in '.*' are damaged; remove that folder and run again", str(caught.value))


def test_a_note_that_a_crash_cut_short_is_no_note(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SETTLED_SECONDS", -1.0)
    corpus = tokenize([str(data)], Bytes(), folder=tmp_path / "cache")
    (note,) = (tmp_path / "cache" / "keys").iterdir()
    assert note.read_text() == corpus.fingerprint
    note.write_text(corpus.fingerprint[:9])
    assert np.array_equal(tokenize([str(data)], Bytes(), folder=tmp_path / "cache").whole.documents, corpus.whole.documents)
    assert note.read_text() == corpus.fingerprint
