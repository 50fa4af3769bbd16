"""Inputs for the models, made here or found on any machine: the same ones every time.

Each function gives feeds, the first of them for calibration; `count` is how many there are.
"""

from __future__ import annotations

import itertools
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from benchmarks.zoo.lines import render
from benchmarks.zoo.sentences import load_sentences
from benchmarks.zoo.voice import conversation, listen, open_detector, room, voice

Feed = dict[str, NDArray[Any]]

# ---- texts and files ----

_HEBREW, _ARABIC = (
    line.split()
    for line in Path(__file__).with_name("words.txt").read_text(encoding="utf-8").splitlines()
)
_HEBREW_LETTERS = [chr(code) for code in range(0x05D0, 0x05EB)]


def files(count: int) -> list[Feed]:
    """Files of many kinds: the beginning and the end of each, as Magika reads them."""
    root = Path(sysconfig.get_paths()["purelib"])
    by_kind: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.stat().st_size > 64 and path.suffix:
            by_kind.setdefault(path.suffix, []).append(path)
    random = np.random.default_rng(0)
    kinds = sorted(by_kind, key=lambda kind: -len(by_kind[kind]))[:40]
    for kind in kinds:
        by_kind[kind] = [by_kind[kind][n] for n in random.permutation(len(by_kind[kind]))]
    found: list[Feed] = []
    seen: set[bytes] = set()
    for turn in itertools.count():
        if len(found) == count:
            break
        left = by_kind[kinds[turn % len(kinds)]]
        if not left:
            continue  # a rare kind, whose files have all been taken
        data = np.fromfile(left.pop(), np.uint8)
        if data.tobytes() in seen:
            continue  # a copy: what calibrates must not judge
        seen.add(data.tobytes())
        ends = np.full(2048, 256, np.int32)
        begin, end = data[:1024], data[-1024:]
        ends[: len(begin)], ends[2048 - len(end) :] = begin, end
        found.append({"bytes": ends[None]})
    return found


def arabic(count: int, ids: Path) -> list[Feed]:
    """Lines of Arabic words, letter by letter, by the numbers that the model's file gives them."""
    numbers = json.loads(ids.read_text(encoding="utf-8"))
    return [
        {
            "char_inputs": np.array([[numbers[letter] for letter in line]], np.int64),
            "diac_inputs": np.ones((1, len(line)), np.int64),
            "input_lengths": np.array([len(line)], np.int64),
        }
        for line in _lines(count, _ARABIC)
    ]


def hebrew(count: int) -> list[Feed]:
    """Lines of Hebrew words, letter by letter: letters are numbered from 16 on, the space is 4."""
    return [
        {
            "input_1": np.array(
                [[4 if letter == " " else 16 + _HEBREW_LETTERS.index(letter) for letter in line]],
                np.float32,
            )
        }
        for line in _lines(count, _HEBREW)
    ]


def _lines(count: int, words: list[str]) -> Iterator[str]:
    random = np.random.default_rng(1)
    for _ in range(count):
        yield " ".join(random.choice(words, int(random.integers(3, 9))))


def sentences(count: int) -> list[Feed]:
    """English sentences, as tokens."""
    from benchmarks.zoo.minilm import encode, minilm_dir

    calibration, held_out = load_sentences()
    chosen = [*calibration[: count // 2], *held_out[: count - count // 2]]
    return [dict(encode([sentence], minilm_dir())) for sentence in chosen]


# ---- sounds ----


def speech_frames(count: int, model: Path) -> list[Feed]:
    """Frames of voices and silences, with the state that the float model has there."""
    heard = listen(open_detector(model).run, conversation(range(count // 40 + 1), 0.7))
    return [feed for feed, _ in itertools.islice(heard, count)]


def recordings(count: int) -> list[Feed]:
    """Nine seconds of speech in more or less noise, at more or less level."""
    random, found = np.random.default_rng(2), []
    for n in range(count):
        sound = voice(9.01, n) * random.uniform(0.1, 1.0)
        sound += random.standard_normal(len(sound)) * random.choice([0.0, 0.003, 0.02, 0.1])
        found.append({"input_1": np.asarray(sound[None], np.float32)})
    return found


def spectra(count: int, model: Path) -> list[Feed]:
    """Windows of a spectrum of voices in a room, 76 steps of 32 bands: (1, 76, 32, 1)."""
    from onnxruntime import InferenceSession

    session = InferenceSession(model.with_name("melspectrogram.onnx"))
    random, found = np.random.default_rng(7), []
    while len(found) < count:
        n = len(found)
        sound = np.concatenate([room(0.5, n), voice(1.5, n) * random.uniform(0.1, 1.0)])
        pressure = np.asarray(sound[None] * 32767, np.float32)
        bands = session.run(None, {"input": pressure})[0].squeeze() / 10 + 2
        found += [
            {"input_1": np.ascontiguousarray(bands[start : start + 76][None, :, :, None])}
            for start in range(0, len(bands) - 75, 16)
        ]
    return found[:count]


def melodies(count: int, name: str) -> list[Feed]:
    """Two seconds of plucked strings, one to three notes at a time."""
    random, found = np.random.default_rng(3), []
    length, rate_hz = 43_844, 22_050
    for _ in range(count):
        sound = np.zeros(length)
        for start in np.arange(0, length, rate_hz // 3):
            times_s = np.arange(length - start) / rate_hz
            for pitch in random.choice(np.arange(40, 80), random.integers(1, 4), replace=False):
                hz = 440 * 2 ** ((pitch - 69) / 12)
                for part in range(1, 6):
                    wave = np.sin(2 * np.pi * hz * part * times_s + random.uniform(0, 6))
                    sound[start:] += wave * np.exp(-times_s * (3 + part)) / part
        found.append({name: np.asarray(sound[None, :, None] / 8, np.float32)})
    return found


# ---- images ----


def text_lines(count: int, height: int, width: int, *, turned: bool = False) -> list[Feed]:
    """Lines of text, every other one upside down where they are to be turned."""
    found = []
    for n, line in enumerate(render(count, seed=4)):
        image = Image.fromarray(np.uint8((line.transpose(1, 2, 0) * 0.5 + 0.5) * 255))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(image, np.float32) / 127.5 - 1
        pixels = pixels[::-1, ::-1] if turned and n % 2 else pixels
        found.append({"x": np.ascontiguousarray(pixels.transpose(2, 0, 1))[None]})
    return found


_MEAN, _SPREAD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def pages(count: int, height: int, width: int, name: str, *, turned: bool = False) -> list[Feed]:
    """Pages with headings, paragraphs and boxes; every quarter turn in turn where asked for."""
    from matplotlib import font_manager

    random = np.random.default_rng(5)
    words = [word for part in load_sentences() for line in part for word in line.split()]
    paths = [font_manager.findfont(font) for font in ("DejaVu Sans", "DejaVu Serif")]
    found = []
    for n in range(count):
        paper, ink = (tuple(map(int, random.integers(*span, 3))) for span in ((200, 256), (0, 90)))
        image = Image.new("RGB", (width, height), paper)
        draw = ImageDraw.Draw(image)
        top = int(random.integers(5, height // 8))
        while top < height - 30:
            size = int(random.integers(height // 40 + 8, height // 24 + 14))
            font = ImageFont.truetype(paths[n % 2], size)
            if random.random() < 0.2:
                box = (width // 8, top, width - width // 8, min(top + height // 6, height - 5))
                draw.rectangle(box, outline=ink, fill=tuple(map(int, random.integers(60, 250, 3))))
                top += height // 6 + size
                continue
            line = " ".join(random.choice(words, int(random.integers(2, 7))))
            draw.text((int(random.integers(4, width // 8)), top), line, fill=ink, font=font)
            top += int(size * 1.4)
        pixels = (np.asarray(image, np.float32) / 255 - _MEAN) / _SPREAD
        pixels = np.rot90(pixels, n % 4) if turned else pixels
        found.append({name: np.ascontiguousarray(pixels.transpose(2, 0, 1))[None]})
    return found


def portraits(count: int, size: int, name: str, photo: Path, *, darkest: float = 0.0) -> list[Feed]:
    """Parts of a photo of a person, of several sizes and brightnesses: (1, size, size, 3).

    Black is `darkest`, white 1.
    """
    random, image, found = np.random.default_rng(6), Image.open(photo).convert("RGB"), []
    for _ in range(count):
        side = int(random.integers(200, min(image.size)))
        left, top = int(random.integers(0, image.width - side)), int(random.integers(0, 60))
        part = image.crop((left, top, left + side, min(top + side, image.height)))
        pixels = np.asarray(part.resize((size, size)), np.float32) / 255 * random.uniform(0.6, 1.0)
        pixels = pixels[:, ::-1] if random.random() < 0.5 else pixels
        pixels = np.float32(darkest) + np.float32(1 - darkest) * pixels
        found.append({name: np.ascontiguousarray(pixels)[None]})
    return found
