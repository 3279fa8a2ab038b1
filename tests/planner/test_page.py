"""The page of a plan: self-contained, its data from the search, its controls change what is drawn (run by node, if there)."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from longspan import plan
from longspan.planner.page import FAMILIES, SCRIPT, page_data, write_page
from tests.helpers.browser import browse, needs_chromium

FOUND = plan("llama-1b", gpus=8, tokens=32_768)


def test_the_page_requests_nothing_and_holds_its_data(tmp_path: Path) -> None:
    write_page(FOUND, tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text()
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=\"(?!data:)", text)
    held = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert held is not None
    assert set(json.loads(held[1])["families"]) == set(FAMILIES)


def test_more_axes_are_never_slower_and_the_chosen_point_is_the_plan_s() -> None:
    data = page_data(FOUND)
    gpus, length = data["chosen"]
    assert (data["gpus"][gpus], data["lengths"][length]) == (8, 32_768)
    every, some = (data["families"][name]["points"][gpus][length] for name in ("every axis", "data and Ulysses"))
    assert every["seconds"] <= some["seconds"]
    assert every["seconds"] == pytest.approx(FOUND.best.seconds, rel=0.02)
    assert data["families"]["every axis"]["longest"] == sorted(data["families"]["every axis"]["longest"])


BROWSER = """
const given = require("fs").readFileSync(0, "utf8");
const drawn = [], elements = {};
function element() {
  return { children: [], handlers: {}, addEventListener(name, run) { this.handlers[name] = run; },
    appendChild(child) { this.children.push(child); }, replaceChildren() { this.children = []; } };
}
const document = { createElement: element, getElementById(id) { return elements[id] ??= element(); } };
elements.data = { textContent: given };
const Plotly = { react: (id, traces, layout) => drawn.push([id, JSON.stringify([traces, layout])]) };
SCRIPT
const first = drawn.splice(0);
elements.gpus.value = 0; elements.gpus.handlers.input();
const fewer = drawn.splice(0);
elements.length.value = 0; elements.length.handlers.input();
const shorter = drawn.splice(0);
console.log(JSON.stringify([first.map(d => d[0]), fewer[0][1] !== first[0][1], shorter[0][1] !== fewer[0][1],
  elements.table.children.length, elements["length-shown"].textContent]));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script")
def test_the_controls_change_the_plots() -> None:
    data = page_data(FOUND)
    run = subprocess.run(
        ["node", "-e", BROWSER.replace("SCRIPT", SCRIPT)], input=json.dumps(data), capture_output=True, text=True, check=True
    )
    plots, gpus_change, length_changes, rows, shown = json.loads(run.stdout)
    assert plots == ["time", "memory", "longest"]
    assert gpus_change
    assert length_changes
    assert rows == len(FAMILIES)
    assert shown == f"{data['lengths'][0]:,}"


MOVED = """
  const state = () => [...document.querySelectorAll(".plots > div")].map(plot =>
    [...plot.querySelectorAll("path.js-line")].map(path => path.getAttribute("d")).join());
  const drawn = [state()];
  for (const name of ["gpus", "length"]) {
    const control = document.getElementById(name);
    control.value = 0;
    control.dispatchEvent(new Event("input"));
    drawn.push(state());
  }
  const lines = [...document.querySelectorAll(".plots > div")].map(plot => plot.querySelectorAll("path.js-line").length);
  const shapes = document.querySelectorAll("#time .shapelayer path")[0].getAttribute("d");
  return { drawn, lines, rows: document.querySelectorAll("#table tr").length, shapes,
    wide: document.documentElement.scrollWidth <= window.innerWidth };
"""


@pytest.mark.long
@needs_chromium
def test_a_browser_draws_the_page_and_its_controls_without_an_error_or_a_request(tmp_path: Path) -> None:
    write_page(FOUND, tmp_path / "plan.html")
    page = browse(tmp_path / "plan.html", MOVED)
    assert page.console == []
    assert page.requested == []
    first, fewer, _ = page.found["drawn"]
    assert all(page.found["lines"])
    assert first[0] != fewer[0]  # fewer GPUs: other times
    assert first[1] != fewer[1]
    assert page.found["rows"] == len(FAMILIES)
    assert page.found["wide"]
