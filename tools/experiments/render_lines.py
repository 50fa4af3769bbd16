"""Lines of text as images, for models that read: samples for run_quantization_switching_cnn.py.

    pip download --no-deps rapidocr-onnxruntime==1.4.4 && unzip rapidocr_onnxruntime-*.whl
    python tools/experiments/render_lines.py lines.npz --count 120
    python tools/experiments/run_quantization_switching_cnn.py --samples lines.npz \\
        --model rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx

Two words each, of the bundled sentences, in one of three fonts, dark on light: (count, 3, 48, 320)
float32 in -1..1, blue first, as PP-OCR was trained.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.zoo.lines import render

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help=".npz to write")
    parser.add_argument("--count", type=int, default=20, help="lines (default: 20)")
    parser.add_argument("--input-name", default="x", help="name of the model's input (default: x)")
    arguments = parser.parse_args()
    np.savez(arguments.output, **{arguments.input_name: render(arguments.count)})
