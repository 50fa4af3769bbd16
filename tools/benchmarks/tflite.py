"""How often the bank of a .tflite file answers as LiteRT does on the file, level by level.

    PYTHONPATH=tools python -m benchmarks.tflite FOLDER [--format table|md|json]

FOLDER holds what `benchmarks.make_mobilenet_tflite` made. Banks are calibrated with 200 images and
asked 500 others. "ties" counts an answer as the same that LiteRT scores as high as its own: int8
scores have few steps.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter as LiteRT
from numpy.typing import NDArray

from bapq_edge.compat.tflite import Interpreter
from bapq_tools import build_bank

from .tables import add_format, print_table
from .zoo.shapes import shapes

FILES = ("float32.tflite", "int8.tflite")
LEVELS = (8, 4, 2)
CALIBRATION_IMAGES = 200
IMAGES = 500
HEADS = ("file", "LiteRT right", "level", "right", "LiteRT's answer", "with ties")


def main() -> int:
    """Build, ask and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.tflite", description=__doc__)
    parser.add_argument("folder", type=Path)
    add_format(parser, "json")
    arguments = parser.parse_args()
    rows = [row for name in FILES for row in _rows(arguments.folder / name)]
    if arguments.format == "json":
        print(json.dumps([dict(zip(HEADS, row, strict=True)) for row in rows], indent=1))
        return 0
    title = f"Top-1 on {IMAGES} images of shapes"
    cells = [[f"{x:.1%}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    print_table(title, HEADS, cells, arguments.format)
    return 0


def _rows(path: Path) -> list[tuple[Any, ...]]:
    real = LiteRT(str(path))
    real.allocate_tensors()
    details = real.get_input_details()[0]
    calibration, _ = shapes(CALIBRATION_IMAGES, seed=1)
    images, classes = shapes(IMAGES, seed=2)
    bank = path.with_suffix(".bank")
    samples = {details["name"]: _as_input(calibration, details)}
    build_bank(path, bank, calibration=samples)
    inputs = _as_input(images, details)
    expected = _scores(real, inputs)
    answers = expected.argmax(1)
    rows = []
    for level in LEVELS:
        with Interpreter(bank, level=level) as own:
            own.allocate_tensors()
            found = _scores(own, inputs).argmax(1)
        best = expected == expected.max(1, keepdims=True)
        rows.append(
            (
                path.name,
                float(np.mean(answers == classes)),
                level,
                float(np.mean(found == classes)),
                float(np.mean(found == answers)),
                float(np.mean(best[np.arange(IMAGES), found])),
            )
        )
    return rows


def _as_input(images: NDArray[np.float32], details: Mapping[str, Any]) -> NDArray[Any]:
    scale, zero_point = details["quantization"]
    if not scale:
        return images
    values = np.clip(np.round(images / scale + zero_point), -128, 127)
    return values.astype(details["dtype"])


def _scores(interpreter: Any, inputs: NDArray[Any]) -> NDArray[Any]:
    read = interpreter.get_input_details()[0]["index"]
    written = interpreter.get_output_details()[0]["index"]
    scores = []
    for image in inputs:
        interpreter.set_tensor(read, image[None])
        interpreter.invoke()
        scores.append(interpreter.get_tensor(written)[0])
    return np.array(scores)


if __name__ == "__main__":
    sys.exit(main())
