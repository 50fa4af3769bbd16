"""The pages as a browser draws them: no errors, nothing cut off, and text that can be read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import warnings
from html import unescape

import numpy as np
import pytest

from bapq_edge import Session
from bapq_edge.bank.reader import Bank
from bapq_edge.errors import BoundaryWarning
from bapq_tools import build_bank
from bapq_tools.boundary.fit import fit
from bapq_tools.report.live_sections import live_sections
from bapq_tools.report.page import page
from benchmarks.zoo.digits import digits_cnn_path, split_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTHS = (390, 1280)
LEAST_CONTRAST = 4.5
"""WCAG 2.2, level AA."""

MEASURE = """
<script>
function channels(color) { return color.match(/[\\d.]+/g).slice(0, 3).map(Number); }
function luminance(color) {
  const [r, g, b] = channels(color).map(v => v / 255).map(
    v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(a, b) {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
}
const paper = getComputedStyle(document.body).backgroundColor;
let worst = 99, where = "", outside = [];
for (const each of document.body.querySelectorAll("*")) {
  const own = [...each.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  if (!own || ["SCRIPT", "STYLE", "TITLE"].includes(each.tagName.toUpperCase())) continue;
  const style = getComputedStyle(each);
  const found = contrast(each.closest("svg") ? style.fill : style.color, paper);
  if (found < worst) { worst = found; where = each.outerHTML.slice(0, 80); }
  const box = each.getBoundingClientRect();
  const inside = each.closest(".wide") === null;
  const beyond = box.left < -1 || box.right > innerWidth + 1;
  if (inside && beyond) outside.push(each.outerHTML.slice(0, 80));
}
parent.postMessage(JSON.stringify({
  width: innerWidth, scroll: document.documentElement.scrollWidth, worst, where, outside, paper
}), "*");
</script>
"""

FRAME = """<!doctype html><pre id="measured"></pre><script>
onmessage = event => { document.getElementById("measured").textContent = event.data; };
</script><iframe src="%s" width="%d" height="3000"></iframe>
"""
"""Around a page: a window of Chromium itself is never narrower than 500 pixels."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt install chromium"),
]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """The page of a bank with a boundary model and a trace, and that of a running session."""
    folder = tmp_path_factory.mktemp("pages")
    split, bank, trace = split_of("cnn"), folder / "digits.bank", folder / "trace.json"
    samples = {"image": split.x_calibration}
    build_bank(digits_cnn_path(), bank, calibration=samples, workers=1, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BoundaryWarning)  # its answers do for an escalation
        fit(bank, {"image": split.x_train[:400]}, digits_cnn_path(), progress=False)
    np.savez(folder / "x.npz", image=split.x_test[:1])
    commands = (
        ["profile", bank, "--input", folder / "x.npz", "--weight-budget", "60KiB", "-o", trace],
        ["report", bank, "--trace", trace, "-o", folder / "report.html"],
    )
    from bapq_edge.cli import main

    for command in commands:
        assert main([str(argument) for argument in command]) == 0
    history = []
    with Session(bank, memory_budget="1GiB", controller="auto") as session:
        for level in (8, 4, 2):
            session.set_level(level)
            session.run(None, {"image": split.x_test[:1]})
            history.append(session.status())
    assert Bank.open(bank).manifest.boundary
    return {
        "report": (folder / "report.html").read_text(),
        "monitor": page("digits, process 4711", [*live_sections(history)]),
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report", "monitor"])
def test_a_page_can_be_read(documents, tmp_path, name, width, scheme):
    file = tmp_path / f"{name}.html"
    file.write_text(documents[name].replace("</body>", MEASURE + "</body>"))
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME % (file.name, width))
    picture = tmp_path / f"{name}_{width}_{scheme}.png"
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
        *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width + 60},3100"),
        *(["--force-dark-mode"] if scheme == "dark" else []),
        *("--hide-scrollbars", f"--screenshot={picture}", "--dump-dom", f"file://{frame}"),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert not re.findall(r"CONSOLE.*", ran.stderr)
    found = json.loads(unescape(re.search(r'<pre id="measured">(.*?)</pre>', ran.stdout)[1]))
    dark = sum(map(int, re.findall(r"\d+", found["paper"])[:3])) < 3 * 128
    assert dark == (scheme == "dark"), found["paper"]
    assert found["width"] == width
    assert found["scroll"] <= found["width"] and found["outside"] == []
    assert found["worst"] >= LEAST_CONTRAST, found["where"]
