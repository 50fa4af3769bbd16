"""Lines of text as images, for models that read; their fonts come with matplotlib."""

from __future__ import annotations

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from .sentences import load_sentences

__all__ = ["render"]

_SIZE = (320, 48)
_FONTS = ("DejaVu Sans", "DejaVu Serif", "DejaVu Sans Mono")


def render(count: int, seed: int = 0) -> np.ndarray:
    """So many lines of two words, (count, 3, 48, 320) float32 in -1..1, blue first."""
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
