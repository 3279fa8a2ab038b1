"""Ranks with other code, libraries or meshes are refused together, before anything else; hosts are known and shown."""

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longspan import LayoutError, ParallelMesh, RunError
from longspan.distributed import software as module
from longspan.distributed.software import RankFacts, refuse_other_software, software
from tests.helpers.ranks import on_ranks


def facts(host: str = "a", **software: str) -> RankFacts:
    return RankFacts(mesh="", host=host, software={"torch": "2.13.0", "longspan's code": "1f"} | software)


def test_all_that_differs_is_named_with_ranks_and_hosts() -> None:
    refuse_other_software([facts(), facts("b")])
    with pytest.raises(RunError) as error:
        refuse_other_software([facts(), facts("b"), facts("c", torch="2.11.0", **{"longspan's code": "2e"}), facts("d")])
    assert str(error.value) == (
        "ranks run different software: longspan's code is 1f on rank 0 and 2e on rank 2; torch is 2.13.0 on rank 0 and 2.11.0 "
        "on rank 2 (rank 0 is on host a, rank 2 on c); install the same versions, and the same files of longspan, for all ranks"
    )
    with pytest.raises(RunError, match="transformers is missing on rank 0 and 5 on rank 1"):
        refuse_other_software([facts(), facts(transformers="5")])


def test_what_runs_is_known_by_version_and_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_wheel = torch.__version__.split("+")[0]  # a wheel for CUDA has its name in one of the two
    assert software()["torch"].split("+")[0] == without_wheel
    (tmp_path / "a").mkdir()
    (tmp_path / "__init__.py").touch()
    (tmp_path / "a" / "b.py").write_text("x = 1\n")
    monkeypatch.setattr(module.longspan, "__file__", str(tmp_path / "__init__.py"))
    before = module._code_hash()
    assert module._code_hash() == before
    (tmp_path / "a" / "b.py").write_text("x = 2\n")
    assert module._code_hash() != before


def test_ranks_with_other_code_never_make_a_mesh(tmp_path: Path) -> None:
    first, second = on_ranks(2, other_code, tmp_path=tmp_path)
    assert first == second
    assert first.startswith("ranks run different software: longspan's code is aa on rank 0 and bb on rank 1 (")


def other_code() -> str:
    module.software = lambda: {"longspan's code": "ab"[dist.get_rank()] * 2}  # type: ignore[assignment]
    with pytest.raises(RunError) as error:
        ParallelMesh(ulysses=dist.get_rank() + 1)  # the code explains why the rest differs
    return str(error.value)


def test_a_mesh_knows_its_hosts_and_warns_once(tmp_path: Path) -> None:
    (logged, shown), (nothing, _), *_ = on_ranks(4, on_two_hosts, tmp_path=tmp_path)
    (sentence,) = logged
    assert sentence.startswith(
        "the all-to-alls of ulysses=4 cross hosts; with ulysses=2 and ring=2 they would stay inside a host"
    )
    assert nothing == []
    assert shown.splitlines()[1:] == ["host host0  ranks 0-1  ulysses 0-1", "host host1  ranks 2-3  ulysses 2-3"]
    assert shown.startswith("ParallelMesh(data=1, ring=1, ulysses=4, ")


def on_two_hosts() -> tuple[list[str], str]:
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("longspan.distributed.mesh").addHandler(handler)
    module.socket.gethostname = lambda: f"host{dist.get_rank() // 2}"  # type: ignore[attr-defined]
    shown = str(ParallelMesh(ulysses=4))
    ParallelMesh(ulysses=2, ring=2)
    return logged, shown


def test_ranks_that_ask_for_other_meshes_are_refused(tmp_path: Path) -> None:
    assert on_ranks(2, other_meshes, tmp_path=tmp_path) == [True, True]


def other_meshes() -> bool:
    with pytest.raises(LayoutError, match="but rank 1 for ulysses=2 ring=1"):
        ParallelMesh(ulysses=1 + dist.get_rank())
    return True
