"""The kernel families of libbapq, called through ctypes."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bapq_edge.engine.library import library_path
from bapq_edge.profiling.kernel_speed import PanelStruct, TileFunction, TileStruct
from support.kernel_reference import BLOCK, TILE_ROWS, Panel, Tile

LEVEL_INDEX = {32: 0, 8: 1, 4: 2, 2: 3, 1: 4}
SCALE_ROWS = 4


_QuantizeFn = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
)
_SumsFn = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p)
_ApplyFn = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p)


class _CKernels(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("tile", TileFunction * 5),
        ("quantize_row", _QuantizeFn),
        ("block_sums", _SumsFn),
        ("depthwise", ctypes.c_void_p),
        ("sum_levels", ctypes.c_uint32),
        ("even_sum_levels", ctypes.c_uint32),
        ("apply", _ApplyFn),
    )


def _guarded(shape: tuple[int, ...], dtype: Any) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """An output array followed by 64 bytes that nobody may write."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.full(count + 64, 0xA5, np.uint8)
    return raw[:count].view(dtype).reshape(shape), raw[count:]


def _by_fours(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """(m, blocks) as kernels read it: (ceil(m/4), blocks, 4)."""
    m, blocks = scale.shape
    padded = np.full((-(-m // SCALE_ROWS) * SCALE_ROWS, blocks), np.nan, np.float32)
    padded[:m] = scale
    return padded.reshape(-1, SCALE_ROWS, blocks).transpose(0, 2, 1)


@dataclass(frozen=True)
class Family:
    """One kernel family."""

    name: str
    table: _CKernels

    def tile(self, tile: Tile, panel: Panel) -> NDArray[np.float32]:
        """Return out (m, 16) of one tile."""
        planes = [np.ascontiguousarray(plane) for plane in tile.packed()]
        m = panel.x.shape[0]
        scale = panel.scale if panel.uniform else _by_fours(panel.scale)
        arrays = [np.ascontiguousarray(a) for a in (panel.q, scale, panel.sum, panel.x)]
        codes = [plane.ctypes.data for plane in planes] + [None] * (2 - len(planes))
        c_tile = TileStruct(
            (ctypes.c_void_p * 2)(*codes),
            tile.scale.ctypes.data if tile.level != 32 else None,
            tile.blocks,
            tile.scale_blocks,
            tile.residual_steps,
            tile.padding,
        )
        c_panel = PanelStruct(
            *(array.ctypes.data for array in arrays), panel.uniform, panel.zero_point
        )
        out, guard = _guarded((m, TILE_ROWS), np.float32)
        run = self.table.tile[LEVEL_INDEX[tile.level]]
        run(ctypes.byref(c_tile), ctypes.byref(c_panel), m, out.ctypes.data)
        assert (guard == 0xA5).all()
        return out

    def quantize_row(
        self, x: NDArray[np.float32]
    ) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32]]:
        """Return q (blocks*32,), scale (blocks,), sum (blocks,) of x (n,)."""
        x = np.ascontiguousarray(x, np.float32)
        blocks = -(-len(x) // BLOCK)
        q, q_guard = _guarded((blocks * BLOCK,), np.int8)
        scale, scale_guard = _guarded((blocks, SCALE_ROWS), np.float32)
        total, total_guard = _guarded((blocks,), np.float32)
        self.table.quantize_row(
            x.ctypes.data, len(x), q.ctypes.data, scale.ctypes.data, total.ctypes.data
        )
        assert all((guard == 0xA5).all() for guard in (q_guard, scale_guard, total_guard))
        assert (scale[:, 1:].view(np.uint8) == 0xA5).all()
        return q, scale[:, 0], total

    def block_sums(self, q: NDArray[np.int8]) -> NDArray[np.float32]:
        """Return (m, blocks) of q (m, blocks*32)."""
        q = np.ascontiguousarray(q)
        rows, blocks = q.shape[0], q.shape[1] // BLOCK
        out, guard = _guarded((rows, blocks), np.float32)
        self.table.block_sums(q.ctypes.data, rows, blocks, out.ctypes.data)
        assert (guard == 0xA5).all()
        return out

    def apply(
        self, function: int, bias: NDArray[np.float32] | None, x: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Return a function of x + bias, (m, 16)."""
        out, guard = _guarded(x.shape, np.float32)
        out[:] = x
        self.table.apply(
            function, None if bias is None else bias.ctypes.data, len(x), out.ctypes.data
        )
        assert (guard == 0xA5).all()
        return out


@dataclass(frozen=True)
class Library:
    """libbapq's kernel dispatch."""

    handle: ctypes.CDLL

    def by_name(self, name: str) -> Family | None:
        """Return the family, or None where the library answers NULL."""
        found = self.handle.bapq_kernels_by_name(name.encode())
        return Family(found.contents.name.decode(), found.contents) if found else None

    def available(self) -> list[Family]:
        """Return every family this CPU runs, best first."""
        pointers = (ctypes.POINTER(_CKernels) * 8)()
        count = self.handle.bapq_kernels_available(pointers, 8)
        return [Family(p.contents.name.decode(), p.contents) for p in pointers[:count]]

    def best(self) -> Family | None:
        """Return the family that BAPQ_ISA or the CPU chooses."""
        found = self.handle.bapq_kernels_best()
        return Family(found.contents.name.decode(), found.contents) if found else None


def open_library() -> Library:
    """Load the installed package's library."""
    handle = ctypes.CDLL(str(library_path()))
    handle.bapq_kernels_by_name.restype = ctypes.POINTER(_CKernels)
    handle.bapq_kernels_by_name.argtypes = (ctypes.c_char_p,)
    handle.bapq_kernels_best.restype = ctypes.POINTER(_CKernels)
    handle.bapq_kernels_best.argtypes = ()
    handle.bapq_kernels_available.restype = ctypes.c_int32
    handle.bapq_kernels_available.argtypes = (
        ctypes.POINTER(ctypes.POINTER(_CKernels)),
        ctypes.c_int32,
    )
    return Library(handle)
