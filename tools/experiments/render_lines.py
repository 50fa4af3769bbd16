"""Lines of text as images, for models that read: samples for run_quantization_switching_cnn.py.

    pip download --no-deps rapidocr-onnxruntime==1.4.4 && unzip rapidocr_onnxruntime-*.whl
    python tools/experiments/render_lines.py lines.npz --count 20
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
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from benchmarks.zoo.sentences import load_sentences

_SIZE = (320, 48)
_FONTS = ("DejaVu Sans", "DejaVu Serif", "DejaVu Sans Mono")  # they come with matplotlib


def render(count: int, seed: int = 0) -> np.ndarray:
    """So many lines, (count, 3, 48, 320) float32."""
    random = np.random.default_rng(seed)
    words = [word for sentences in load_sentences() for line in sentences for word in line.split()]
    paths = [font_manager.findfont(name) for name in _FONTS]
    lines = []
    for index in range(count):
        paper, ink = (tuple(map(int, random.integers(*span, 3))) for span in ((200, 256), (0, 90)))
        image = Image.new("RGB", _SIZE, paper)
        font = ImageFont.truetype(paths[index % len(paths)], int(random.integers(20, 30)))
        place = (4, int(random.integers(4, 14)))
        ImageDraw.Draw(image).text(place, " ".join(random.choice(words, 2)), fill=ink, font=font)
        lines.append(np.asarray(image, np.float32).transpose(2, 0, 1)[::-1])
    return (np.stack(lines) / 255 - 0.5) / 0.5


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help=".npz to write")
    parser.add_argument("--count", type=int, default=20, help="lines (default: 20)")
    parser.add_argument("--input-name", default="x", help="name of the model's input (default: x)")
    arguments = parser.parse_args()
    np.savez(arguments.output, **{arguments.input_name: render(arguments.count)})
