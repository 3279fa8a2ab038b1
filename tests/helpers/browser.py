"""A page in headless Chromium: what it drew, what it wrote to the console, and what it requested. Skips where there is none."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on the PATH draws the page; on Debian: apt-get install chromium"
)
PROBE = """
<script>
window.addEventListener("load", () => {
  const answer = document.createElement("pre");
  answer.id = "answer";
  const requested = performance.getEntriesByType("resource").map(entry => entry.name);
  answer.textContent = JSON.stringify({ requested, found: (() => { SCRIPT })() });
  document.body.appendChild(answer);
});
</script></body>
"""


class Page(NamedTuple):
    """What ``found`` the script returned, the URLs ``requested``, and the lines of the ``console``."""

    found: Any
    requested: list[str]
    console: list[str]


def browse(page: Path, script: str, seconds: float = 300.0) -> Page:
    """Load ``page`` from a file, run ``script`` (the body of a function) in it when it has loaded, and return what it found."""
    assert CHROMIUM is not None
    probed = page.with_name(f"probed-{page.name}")
    head, end = page.read_text(encoding="utf-8").rsplit("</body>", 1)
    probed.write_text(head + PROBE.replace("SCRIPT", script) + end, encoding="utf-8")
    run = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr",
            "--window-size=1280,1600", "--virtual-time-budget=30000", f"--user-data-dir={page.parent / 'profile'}",
            "--dump-dom", probed.as_uri(),
        ],
        capture_output=True, text=True, timeout=seconds, check=True,
    )  # fmt: skip
    (answer,) = re.findall(r'<pre id="answer">(.*?)</pre>', run.stdout, re.DOTALL)
    answer = answer.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    return Page(console=[line for line in run.stderr.splitlines() if ":CONSOLE" in line], **json.loads(answer))
