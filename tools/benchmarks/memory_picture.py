"""The picture of the README: memory for the same answers, model by model.

    python -m benchmarks.streaming budgets --format json > docs/pictures/memory.json
    python -m benchmarks.memory_picture docs/pictures/memory.json -o docs/pictures/memory.svg

An SVG that is readable on light and dark pages.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIB = 1 << 20
TITLES = {
    "vgg19": "VGG-19",
    "resnet50": "ResNet-50",
    "minilm": "MiniLM-L6-v2",
    "densenet121": "DenseNet-121",
}
WIDTH, LABEL_WIDTH, VALUE_WIDTH = 760, 130, 150
BAR, GAP, TOP = 18, 18, 64
STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #1f2328 }
  .title { font-weight: 600; font-size: 16px }
  .float32 { fill: #8c959f }
  .bank { fill: #1a7f5a }
  .small { font-size: 12px }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .float32 { fill: #767e88 }
    .bank { fill: #3fb58a }
  }
"""


def picture(rows: Sequence[dict[str, Any]]) -> str:
    """The SVG; `rows` are the values of the section `budgets` of benchmarks.streaming."""
    rows = sorted(rows, key=lambda row: -row["fp32_growth_bytes"])
    largest_bytes = rows[0]["fp32_growth_bytes"]
    scale = (WIDTH - LABEL_WIDTH - VALUE_WIDTH) / largest_bytes
    height = TOP + len(rows) * (2 * BAR + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" aria-label="Memory for the same answers">',
        f"<style>{STYLE}</style>",
        '<text class="title" x="0" y="18">Memory for the same answers</text>',
        f'<rect class="float32" x="{LABEL_WIDTH}" y="34" width="12" height="12"/>',
        f'<text class="small" x="{LABEL_WIDTH + 18}" y="45">ONNX Runtime, float32</text>',
        f'<rect class="bank" x="{LABEL_WIDTH + 190}" y="34" width="12" height="12"/>',
        f'<text class="small" x="{LABEL_WIDTH + 208}" y="45">bapq, level 8 within a budget</text>',
    ]
    for i, row in enumerate(rows):
        y = TOP + i * (2 * BAR + GAP)
        name = TITLES.get(row["model"], row["model"])
        parts.append(f'<text x="0" y="{y + BAR + 5}">{name}</text>')
        less = 1 - row["growth_bytes"] / row["fp32_growth_bytes"]
        for kind, key, note in (
            ("float32", "fp32_growth_bytes", ""),
            ("bank", "growth_bytes", f", {less:.0%} less"),
        ):
            width = row[key] * scale
            text = f"{row[key] / MIB:.0f} MiB{note}"
            parts.append(
                f'<rect class="{kind}" x="{LABEL_WIDTH}" y="{y}" width="{width:.1f}" '
                f'height="{BAR - 2}"/>'
                f'<text class="small" x="{LABEL_WIDTH + width + 8:.1f}" y="{y + 13}">{text}</text>'
            )
            y += BAR
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Read the measured figures, write the picture."""
    parser = argparse.ArgumentParser(prog="benchmarks.memory_picture", description=__doc__)
    parser.add_argument("figures", type=Path, help="what benchmarks.streaming budgets measured")
    parser.add_argument("-o", dest="out", type=Path, required=True, help="the SVG to write")
    arguments = parser.parse_args()
    rows = json.loads(arguments.figures.read_text(encoding="utf-8"))["budgets"]
    arguments.out.write_text(picture(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
