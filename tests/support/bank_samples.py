"""Random layers and the banks made of them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bapq_edge.bank.codes import LayerCodes, from_bf16, to_bf16
from bapq_edge.bank.layer import Layer
from bapq_edge.bank.layout import LEVELS, PLANES, SCALED_PLANES, Level, planes_for, scaled_levels
from bapq_edge.bank.manifest import SourceModel
from bapq_edge.bank.verify import verify
from bapq_edge.bank.writer import BankWriter

GRAPH = b"\x12\x05graph"
"""As far as a reader looks a graph: a model with nothing but the name of its producer."""
SOURCE = SourceModel("sample", 1234, "ab" * 16, "bapq test")


@dataclass(frozen=True)
class Shape:
    rows: int
    columns: int
    chunk_rows: int = 16
    scale_columns: int = 32
    has_bias: bool = True
    residual_steps: int = 8
    own_levels: tuple[Level, ...] | None = None
    """levels of the layer, where they are not all of the bank's"""
    dropped: int = 0
    """Rows, of all, that are not stored."""
    reordered: bool = False

    @property
    def stored_rows(self) -> int:
        return self.rows - self.dropped


RAGGED = (
    Shape(1, 1),
    Shape(16, 32, has_bias=False),
    Shape(17, 33, scale_columns=64),
    Shape(100, 96, chunk_rows=48, residual_steps=13),
    Shape(33, 321, chunk_rows=32, scale_columns=128, has_bias=False, residual_steps=16),
)

PRUNED = (
    Shape(40, 20, reordered=True),
    Shape(50, 33, dropped=20),
    Shape(50, 33, dropped=20, has_bias=False),
    Shape(19, 5, dropped=18, reordered=True),
    Shape(37, 40, dropped=3, reordered=True, has_bias=False, own_levels=(8, 4)),
    Shape(7, 8),
)


def random_codes(shape: Shape, levels=LEVELS, seed=0) -> LayerCodes:
    random = np.random.default_rng([seed, shape.rows, shape.columns])
    codes = LayerCodes()
    own = shape.own_levels or levels
    for plane in planes_for(own):
        level = PLANES[plane]
        if plane == "f32":
            codes.weight = random.standard_normal((shape.stored_rows, shape.columns), np.float32)
        else:
            top = 16 if plane in ("p4", "r8") else 2
            codes.codes[plane] = random.integers(
                0, top, (shape.stored_rows, shape.columns), dtype=np.uint8
            )
        if SCALED_PLANES.get(plane) in scaled_levels(own):
            groups = -(-shape.columns // shape.scale_columns)
            codes.scales[level] = from_bf16(
                to_bf16(random.random((shape.stored_rows, groups), np.float32))
            )
        if shape.has_bias and level in own:
            codes.bias[level] = random.standard_normal(shape.stored_rows, np.float32)
    return codes


def random_rows(shape: Shape) -> dict:
    """Row order (rows,) and bias of the dropped rows, as far as the layer has them."""
    random = np.random.default_rng([2, shape.rows, shape.columns])
    rows: dict = {}
    if shape.reordered:
        order = random.permutation(shape.rows).astype(np.uint32)
        order[shape.stored_rows :].sort()
        rows["row_order"] = order
    if shape.dropped and shape.has_bias:
        rows["dropped_bias"] = random.standard_normal(shape.dropped, np.float32)
    return rows


def random_sensitivity(shape: Shape, levels=LEVELS) -> np.ndarray:
    """(chunks, levels) float32"""
    random = np.random.default_rng([1, shape.rows, shape.columns])
    chunks = -(-shape.stored_rows // shape.chunk_rows)
    heard = [level != 32 and level in (shape.own_levels or levels) for level in levels]
    return random.random((chunks, len(levels)), np.float32) * np.array(heard)


def describe(name: str, shape: Shape, levels=LEVELS) -> Layer:
    """What the manifest tells about a layer of that shape."""
    own = shape.own_levels or levels
    return Layer(
        name=name,
        operators=("Gemm",),
        rows=shape.rows,
        stored_rows=shape.stored_rows,
        columns=shape.columns,
        chunk_rows=shape.chunk_rows,
        residual_steps=shape.residual_steps,
        scale_columns={level: shape.scale_columns for level in scaled_levels(own)},
        has_bias=shape.has_bias,
        method={level: "nearest" for level in own if level != 32},
        relative_error={level: 1 / level for level in own},
    )


def add(writer: BankWriter, name: str, shape: Shape, codes: LayerCodes, levels=LEVELS, **other):
    """Add a layer; `other` replaces fields of its description, its sensitivity or its tables."""
    tables = {"sensitivity": random_sensitivity(shape, levels), **random_rows(shape)}
    names = ("sensitivity", "row_order", "dropped_bias")
    tables |= {key: value for key, value in other.items() if key in names}
    fields = {key: value for key, value in other.items() if key not in names}
    return writer.add_layer(replace(describe(name, shape, levels), **fields), codes, **tables)


def write_bank(path, shapes=RAGGED, levels=LEVELS, seed=0, graph=GRAPH):
    """Write a bank of random layers `layer0`, `layer1`, ...; returns their codes."""
    layers = [random_codes(shape, levels, seed) for shape in shapes]
    with BankWriter(path, levels=levels, source=SOURCE) as writer:
        for i, (shape, codes) in enumerate(zip(shapes, layers, strict=True)):
            add(writer, f"layer{i}", shape, codes, levels)
        writer.finish(graph)
    return layers


def assert_same_codes(found: LayerCodes, expected: LayerCodes) -> None:
    if expected.weight is None:
        assert found.weight is None
    else:
        np.testing.assert_array_equal(found.weight, expected.weight)
    for field in ("codes", "scales", "bias"):
        arrays = getattr(expected, field)
        assert getattr(found, field).keys() == arrays.keys()
        for key, array in arrays.items():
            assert getattr(found, field)[key].dtype == array.dtype
            np.testing.assert_array_equal(getattr(found, field)[key], array)


def files_of(directory: Path) -> dict[str, bytes]:
    """The bytes of every file below a directory, by its path in it."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def sound_files_of(bank: Path) -> dict[str, bytes]:
    """The files of a bank that is sound and has nothing beside it."""
    assert verify(bank).ok
    assert os.listdir(bank.parent) == [bank.name]
    return files_of(bank)
