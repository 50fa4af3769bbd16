"""Damaged banks by the thousand: what a reader and a session make of them.

Bytes, from a fuzzer or a seeded generator, say what is done to a small bank. A *blind* mutant is
damage: its checksums are as they were, so it is noticed or harmless. A *vouched* one is an attack:
all checksums fit what was written.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bapq_edge import Session
from bapq_edge.bank.files import digest_of, raw_digest_of
from bapq_edge.bank.manifest import digest_in, seal
from bapq_edge.bank.npy import CHUNK_DTYPE
from bapq_edge.bank.reader import Bank
from bapq_edge.bank.verify import verify
from bapq_edge.errors import BapqError, BapqWarning, DegradedWarning
from support.banks import NO_CLIP, graph_bytes, node, random_codes, write_bank
from support.golden_bank import GOLDEN

WICKED_NUMBERS = (0, -1, 1, 2, 15, 16, 17, 31, 32, 255, 1 << 20, 1 << 24, (1 << 31) - 1, 1 << 31)
WICKED_NUMBERS += (1 << 32, (1 << 53) - 1, 1 << 53, -(1 << 63))
WICKED_VALUES: tuple[Any, ...] = (*WICKED_NUMBERS, 0.5, -0.0, 1e308, True, None, "", "x", [], {})
_TABLE_START = 128


class Choices:
    """Bytes as a row of decisions."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def below(self, limit: int) -> int:
        """A number from 0 to limit - 1; 0 once the bytes are used up."""
        part = self._data[self._at : self._at + 3]
        self._at += 3
        return int.from_bytes(part, "little") % limit if part else 0

    def pick(self, values: Any) -> Any:
        """One of the values."""
        return values[self.below(len(values))]


class Mutants:
    """A bank that is damaged and mended again, in a directory of its own."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.path = folder / "m.bank"
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(source, self.path)
        self._files = {
            str(path.relative_to(self.path)): path.read_bytes()
            for path in sorted(self.path.rglob("*"))
            if path.is_file()
        }
        self._names = list(self._files)

    def apply(self, data: bytes) -> bool:
        """Damage the bank as these bytes say; whether the checksums vouch for it."""
        choices = Choices(data)
        vouched = choices.below(3) > 0
        changed = dict(self._files)
        for _ in range(1 + choices.below(3)):
            name = choices.pick(self._names)
            if name == "manifest.json" and choices.below(4):
                changed[name] = _edited(changed[name], choices)
            else:
                changed[name] = _damaged(changed[name], choices)
        if vouched:
            _vouch(changed)
        self._write(changed)
        return vouched

    def flip(self, name: str, bit: int) -> None:
        """Turn over one bit of a file."""
        data = bytearray(self._files[name])
        data[bit // 8] ^= 1 << bit % 8
        (self.path / name).write_bytes(data)

    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return {name: len(data) for name, data in self._files.items()}

    def mend(self) -> None:
        """Put the bank back as it was."""
        self._write(self._files)

    def _write(self, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            path = self.path / name
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)


def _damaged(data: bytes, choices: Choices) -> bytes:
    out = bytearray(data)
    at = choices.below(len(out) + 1)
    kind = choices.below(16)
    if kind == 0:
        return bytes(out[:at])
    if kind == 1:
        return bytes(out + bytes(1 + choices.below(64)))
    if kind == 2:
        del out[at : at + 1 + choices.below(16)]
    elif kind == 3:
        out[at:at] = bytes(choices.below(256) for _ in range(1 + choices.below(16)))
    elif kind == 4:
        other = choices.below(len(out) + 1)
        length = 1 + choices.below(64)
        out[at : at + length] = out[other : other + length]
    else:
        for _ in range(1 + choices.below(4)):
            if out:
                out[choices.below(len(out))] ^= 1 << choices.below(8)
    return bytes(out)


def _edited(data: bytes, choices: Choices) -> bytes:
    """The manifest with a value replaced, removed or doubled, wherever in it."""
    try:
        place = document = json.loads(data)
    except ValueError:  # damaged before
        return data
    while True:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return data
        key = choices.pick(keys)
        if not isinstance(place[key], dict | list) or not choices.below(8):
            break
        place = place[key]
    kind = choices.below(6)
    if kind == 0:
        del place[key]
    elif kind == 1 and isinstance(place[key], int):
        place[key] += choices.below(5) - 2
    elif kind == 2 and isinstance(place, list):
        place.append(place[key])
    elif kind == 3:
        place[key] = place[choices.pick(keys)]
    else:
        place[key] = choices.pick(WICKED_VALUES)
    return json.dumps(document).encode() + b"\n"


def _vouch(files: dict[str, bytes]) -> None:
    """Make every checksum fit, as far as the manifest can be read."""
    try:
        document = json.loads(files["manifest.json"])
        for entry in document["planes"].values():
            _vouch_for_chunks(files, entry)
        _vouch_for_files(files, document)
        data = json.dumps(document).encode() + b"\n"
        files["manifest.json"] = seal(data) if digest_in(data) else data
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return  # there is nothing to vouch in


def _vouch_for_chunks(files: dict[str, bytes], entry: dict[str, Any]) -> None:
    plane, tables = files[entry["file"]], (entry["chunks"]["file"], entry["digests"]["file"])
    rows = np.frombuffer(files[tables[0]][_TABLE_START:], CHUNK_DTYPE).copy()
    digests = bytearray(files[tables[1]])
    for i, row in enumerate(rows):
        chunk = plane[int(row["offset"]) : int(row["offset"]) + int(row["bytes"])]
        row["crc32"] = zlib.crc32(chunk)
        place = _TABLE_START + 16 * i
        digests[place : place + 16] = raw_digest_of(chunk)
    files[tables[0]] = files[tables[0]][:_TABLE_START] + rows.tobytes()
    files[tables[1]] = bytes(digests)


def _vouch_for_files(files: dict[str, bytes], value: Any) -> None:
    if isinstance(value, list):
        for item in value:
            _vouch_for_files(files, item)
    if not isinstance(value, dict):
        return
    if value.keys() == {"file", "bytes", "blake2b"} and value["file"] in files:
        data = files[value["file"]]
        value["bytes"], value["blake2b"] = len(data), digest_of(data)
    for item in value.values():
        _vouch_for_files(files, item)


# ---- what is done with them ----


class Reader:
    """Opens and verifies mutants of the golden bank, and reads all that is in them."""

    def __init__(self, folder: Path, source: Path = GOLDEN) -> None:
        self.mutants = Mutants(source, folder)

    def check(self, data: bytes) -> bool:
        """Whether the mutant was refused; AssertionError where it was not as it must be."""
        vouched = self.mutants.apply(data)
        return self._refused(lambda: vouched)

    def check_flip(self, name: str, bit: int) -> bool:
        """The same for one bit."""
        self.mutants.flip(name, bit)
        refused = self._refused(lambda: False)
        self.mutants.mend()
        return refused

    def _refused(self, vouched: Callable[[], bool]) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BapqWarning)
            try:
                report = verify(self.mutants.path)
                bank = Bank.open(self.mutants.path)
                for layer in bank.manifest.layers:
                    bank.layer_codes(layer)
            except BapqError as error:
                _check_message(error)
                return True
        if not report.ok:
            return True
        changed = {
            name: (self.mutants.path / name).read_bytes() != data
            for name, data in self.mutants._files.items()
        }
        assert vouched() or not any(changed.values()), f"damage went unnoticed: {changed}"
        return False


class Runner:
    """Opens sessions of mutants and runs them."""

    def __init__(self, folder: Path, *, tiny: bool = False) -> None:
        folder.mkdir(exist_ok=True)
        source = (tiny_bank if tiny else _small_bank)(folder / "source.bank")
        shape = (1, 5) if tiny else (2, 8, 6, 6)
        self._x = np.linspace(-1, 1, math.prod(shape), dtype=np.float32).reshape(shape)
        self._legal = [self._run(source, level=level) for level in (8, 4)]
        self.mutants = Mutants(source, folder)

    def check(self, data: bytes) -> bool:
        """Whether the mutant was refused; AssertionError where it answered what it must not."""
        return self._refused(self.mutants.apply(data), data)

    def check_flip(self, name: str, bit: int) -> bool:
        """The same for one bit."""
        self.mutants.flip(name, bit)
        refused = self._refused(False, b"")
        self.mutants.mend()
        return refused

    def _refused(self, vouched: bool, data: bytes) -> bool:
        options: dict[str, Any] = {"level": 8}
        if len(data) % 2:
            options = {"memory_budget": "64MiB"}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", BapqWarning)
            try:
                answer = self._run(self.mutants.path, **options)
            except BapqError as error:
                _check_message(error)
                return True
        legal = any(np.array_equal(answer, each) for each in self._legal)
        loud = any(issubclass(each.category, DegradedWarning) for each in told)
        assert vouched or legal or loud, "another answer, and not a word"
        return False

    def _run(self, path: Path, **options: Any) -> Any:
        with Session(path, threads=1, **options) as session:
            (name, *_) = [value.name for value in session.get_inputs()] or ["x"]
            return session.run(None, {name: self._x})[0]


def _check_message(error: BapqError) -> None:
    message = str(error)
    assert "\n" not in message and message, repr(message)
    assert len(message) < 2000, message


def tiny_bank(path: Path) -> Path:
    """So few bytes that every bit of them can be turned over."""
    linear = {"use_bias": 1, "clip_low": -NO_CLIP, "clip_high": NO_CLIP}
    graph = graph_bytes([node("MatMul", "x", "y", layer=0, **linear)], ["n", 5], ["n", 3])
    codes = random_codes(np.random.default_rng(4), 3, 5, {4: 32}, True, (8, 4))
    about = {"rows": 3, "columns": 5, "chunk_rows": 16, "residual_steps": 15}
    about |= {"scale_columns": {4: 32}, "has_bias": True}
    return write_bank(path, graph, [("a", "MatMul", codes, about)], (8, 4))


def _small_bank(path: Path) -> Path:
    rng = np.random.default_rng(4)
    window = dict.fromkeys(("stride_h", "stride_w", "dilation_h", "dilation_w", "group"), 1)
    window |= dict.fromkeys(("kernel_h", "kernel_w"), 3) | {"auto_pad": 0}
    window |= dict.fromkeys(("pad_top", "pad_left", "pad_bottom", "pad_right"), 1)
    linear = {"use_bias": 1, "clip_low": -NO_CLIP, "clip_high": NO_CLIP}
    nodes = [
        node("Conv", "x", "h", layer=0, **linear, **window),
        node("MatMul", "h", "y", layer=1, **linear),
    ]
    levels = (8, 4)
    layers = []
    for name, operator, rows, columns in (("a", "Conv", 20, 72), ("b", "MatMul", 18, 6)):
        codes = random_codes(rng, rows, columns, {4: 32}, True, levels)
        about = {"rows": rows, "columns": columns, "chunk_rows": 16, "residual_steps": 15}
        layers.append((name, operator, codes, about | {"scale_columns": {4: 32}, "has_bias": True}))
    graph = graph_bytes(nodes, ["n", 8, 6, 6], ["n", 20, 6, 18])
    return write_bank(path, graph, layers, levels)
