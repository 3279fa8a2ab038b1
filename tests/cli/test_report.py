"""``longspan report``: runs on one page, from their files; a run that is being written; bad input."""

import json
import re
from pathlib import Path

import pytest

from longspan.cli.main import main
from longspan.cli.report import page, read_run
from tests.helpers.browser import browse, needs_chromium


def _run(folder: Path, name: str, losses: list[float], tail: str = "") -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "config.json").write_text(json.dumps({"model": "tiny", "tokens": 64, "ulysses": 2, "run": name}))
    records = [{"step": 1 + i, "loss": loss, "memory_bytes": (1 + i) << 30} for i, loss in enumerate(losses)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / name / "metrics.jsonl").write_text(text + tail)
    (folder / "latest").write_text(name)


def test_two_runs_are_drawn_on_one_page_that_requests_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run(tmp_path / "runs", "first", [3.0, 2.5])
    _run(tmp_path / "runs", "<second>", [3.25])
    html = tmp_path / "page.html"
    assert main(["report", "first", "<second>", "--runs-folder", str(tmp_path / "runs"), "--html", str(html)]) == 0
    assert "first  step 2, loss 2.5000" in capsys.readouterr().out
    text = html.read_text()
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=\"(?!data:)", text)
    assert "&lt;second&gt;" in text
    assert "Loss of training" in text
    assert "Memory of the fullest rank" in text
    assert "Tokens a second" not in text, "a plot without data is left out"
    assert 'http-equiv="refresh"' not in text


def test_a_line_that_is_being_written_is_left_out_and_watching_reloads(tmp_path: Path) -> None:
    _run(tmp_path, "going", [3.0], tail='{"step": 2, "lo')
    run = read_run(str(tmp_path), "latest")
    assert run.metrics["loss"] == ([1], [3.0])
    assert run.metrics["memory_bytes"] == ([1], [float(1 << 30)])
    assert '<meta http-equiv="refresh" content="5">' in page([run], 5)


def test_damaged_records_are_left_out(tmp_path: Path) -> None:
    _run(tmp_path, "there", [1.0])
    damage = b'\xff\xfe\n5\n{"loss": 3.0}\n{"step": 2, "loss": null}\n{"step": 3, "loss": 4.0}\n{"step": true, "loss": 9.0}\n'
    damage += b'{"step": 4, "loss": 1' + b"0" * 400 + b"}\n" + b"[" * 100_000 + b"\n"
    with open(tmp_path / "there" / "metrics.jsonl", "ab") as file:
        file.write(damage)
    run = read_run(str(tmp_path), "there")
    assert run.metrics["loss"] == ([1, 3], [1.0, 4.0])
    assert "4.0000" in page([run], None)


def test_a_page_in_a_folder_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--html", str(tmp_path / "no" / "x.html")]) == 2
    assert "is in a folder that does not exist; make it first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "reason"), [("nothing", "no run 'nothing'"), ("--watch 0", "must be above 0"), ("--watch inf", "at most")]
)
def test_bad_input_is_one_sentence(flags: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run(tmp_path, "there", [1.0])
    assert main(["report", *flags.split(), "--runs-folder", str(tmp_path), "--html", str(tmp_path / "x.html")]) == 2
    assert reason in capsys.readouterr().err


DRAWN = """
  const plots = [...document.querySelectorAll(".js-plotly-plot")];
  return { plots: plots.length, lines: plots.map(plot => plot.querySelectorAll(".scatterlayer path.js-line").length),
    wide: document.documentElement.scrollWidth <= window.innerWidth };
"""


@pytest.mark.long
@needs_chromium
def test_a_browser_draws_every_plot_without_an_error_or_a_request(tmp_path: Path) -> None:
    _run(tmp_path / "runs", "first", [3.0, 2.5, 2.25])
    _run(tmp_path / "runs", "second", [3.25, 3.0])
    html = tmp_path / "page.html"
    assert main(["report", "first", "second", "--runs-folder", str(tmp_path / "runs"), "--html", str(html)]) == 0
    found = browse(html, DRAWN)
    assert (found.console, found.requested) == ([], [])
    assert found.found == {"plots": 2, "lines": [2, 2], "wide": True}
