"""Speed of the kernels on this CPU, by level and class of shape, through libbapq's own table."""

from __future__ import annotations

import ctypes
import time

import numpy as np

from ..bank.layout import LEVELS, Level
from ..engine.library import library_path

__all__ = ["SHAPES", "PanelStruct", "TileFunction", "TileStruct", "TileWork"]

SHAPES = {"one_row": (1, 16384), "16_rows": (16, 2048), "196_rows": (196, 1152)}
"""(activation rows, columns) by class: a sentence's word, a short sentence, a convolution."""

_TILE_ROWS, _BLOCK, _SCALE_ROWS = 16, 32, 4
_MEASURE_S = 0.15


class TileStruct(ctypes.Structure):
    """`bapq_tile` in native/src/kernels/kernels.h."""

    _fields_ = (
        ("code", ctypes.c_void_p * 2),
        ("scale", ctypes.c_void_p),
        ("blocks", ctypes.c_int32),
        ("scale_blocks", ctypes.c_int32),
        ("residual_steps", ctypes.c_int32),
        ("padding", ctypes.c_int32),
    )


class PanelStruct(ctypes.Structure):
    """`bapq_panel` in native/src/kernels/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "scale", "sum", "x")),
        ("uniform", ctypes.c_int32),
        ("zero_point", ctypes.c_int32),
    )


TileFunction = ctypes.CFUNCTYPE(
    None, ctypes.POINTER(TileStruct), ctypes.POINTER(PanelStruct), ctypes.c_int32, ctypes.c_void_p
)


class _Kernels(ctypes.Structure):
    """The beginning of `bapq_kernels`."""

    _fields_ = (("name", ctypes.c_char_p), ("tile", TileFunction * len(LEVELS)))


class TileWork:
    """One tile of 16 rows times a panel, to be run again and again."""

    def __init__(self, level: Level, rows: int, columns: int) -> None:
        """Random codes and activations; a scale for each block of 32 columns."""
        random = np.random.default_rng(0)
        blocks = columns // _BLOCK
        weights = _TILE_ROWS * columns
        self.products = rows * weights
        """Products of one run."""
        self._arrays = [
            random.integers(0, 256, weights * (4 if level == 32 else 1), np.uint8),
            random.integers(0, 256, weights, np.uint8),
            np.full((blocks, _TILE_ROWS), 0x3C00, np.uint16),  # bfloat16, a small number
            random.integers(-127, 128, (rows, columns), np.int8),
            np.full((-(-rows // _SCALE_ROWS), blocks, _SCALE_ROWS), 0.01, np.float32),
            np.zeros((rows, blocks), np.float32),
            np.full((rows, columns), 0.5, np.float32),
            np.empty((rows, _TILE_ROWS), np.float32),
        ]
        if level == 32:  # random bytes would hold NaN and subnormal numbers
            self._arrays[0] = random.standard_normal(weights, np.float32)
        code, second, scale, *panel, out = (array.ctypes.data for array in self._arrays)
        codes = (ctypes.c_void_p * 2)(code, second)
        self._tile = TileStruct(codes, None if level == 32 else scale, blocks, 1, 16, 0)
        self._panel = PanelStruct(*panel, 0, 0)
        library = ctypes.CDLL(str(library_path()))
        library.bapq_kernels_best.restype = ctypes.POINTER(_Kernels)
        function = library.bapq_kernels_best().contents.tile[LEVELS.index(level)]
        self._call = (
            function,
            (ctypes.byref(self._tile), ctypes.byref(self._panel), rows, out),
        )

    def run(self) -> None:
        """Once; other threads go on meanwhile."""
        function, arguments = self._call
        function(*arguments)

    def products_s(self) -> float:
        """Products per second of one thread, the best of three tries."""
        best = 0.0
        for _ in range(3):
            runs, started_s = 0, time.perf_counter()
            while (took_s := time.perf_counter() - started_s) < _MEASURE_S / 3 or not runs:
                self.run()
                runs += 1
            best = max(best, runs * self.products / took_s)
        return best
