"""libbapq through ctypes: the mirror of native/include/bapq.h, its errors as exceptions."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from bapq_edge import errors
from bapq_edge.bank.layout import LEVELS, PLANES, SCALED_PLANES, Level, Plane
from bapq_edge.bank.reader import Bank

__all__ = ["Store", "StoreStats", "kernels_name", "library_path"]

_ABI_VERSION = 1
_PLANE_ORDER: tuple[Plane, ...] = ("f32", "r8", "p4", "m1", "s1")

_STATUS_ERRORS: dict[int, type[errors.BapqError]] = {
    1: errors.RunInputError,
    2: errors.StorageError,
    3: errors.StorageError,
    4: errors.BankTruncatedError,
    5: errors.BankIntegrityError,
    6: errors.UnknownLevelError,
    7: errors.PlatformError,
}


class _Error(ctypes.Structure):
    _fields_ = (
        ("status", ctypes.c_int32),
        ("os_errno", ctypes.c_int32),
        ("layer", ctypes.c_int32),
        ("chunk", ctypes.c_int32),
        ("message", ctypes.c_char * 240),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("chunk_rows", ctypes.c_int32),
        ("first_chunk", ctypes.c_int32),
        ("residual_steps", ctypes.c_int32),
        ("has_bias", ctypes.c_int32),
        ("scale_columns", ctypes.c_int32 * len(PLANES)),
    )


class _Bank(ctypes.Structure):
    _fields_ = (
        ("plane_path", ctypes.c_char_p * len(PLANES)),
        ("extents", ctypes.c_void_p * len(PLANES)),
        ("layers", ctypes.POINTER(_Layer)),
        ("layer_count", ctypes.c_int32),
        ("chunk_count", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class _StoreStats(ctypes.Structure):
    _fields_ = (
        ("resident_bytes", ctypes.c_int64),
        ("read_bytes", ctypes.c_int64),
        ("scratch_bytes", ctypes.c_int64),
        ("live_plans", ctypes.c_int64),
    )


@dataclass(frozen=True)
class StoreStats:
    """What the native store holds right now."""

    resident_bytes: int
    """bytes of the chunks in memory, of all plans that are alive"""
    read_bytes: int
    """bytes read from storage since the store was opened"""
    scratch_bytes: int
    """bytes of the operators' buffers, all open runs together"""
    live_plans: int
    """the published plan and those that open runs still hold"""


def library_path() -> Path:
    """Path of libbapq, inside the installed package.

    Raises PlatformError on a 32-bit Python or when the library is not there.
    """
    if struct.calcsize("P") != 8:
        raise errors.PlatformError(
            "this Python is 32-bit, BAPQ-Edge needs 64-bit: install the 64-bit Raspberry Pi OS"
        )
    path = _installed_library()
    if path is None:
        raise errors.PlatformError(
            f"libbapq.so is not in {Path(__file__).parent}: reinstall with 'pip install bapq-edge'"
        )
    return path


def _installed_library() -> Path | None:
    import bapq_edge

    # An editable install keeps the sources and the built library in different folders.
    for root in bapq_edge.__path__:
        path = Path(root) / "engine" / "libbapq.so"
        if path.is_file():
            return path
    return None


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_path()))
    error = ctypes.POINTER(_Error)
    store = ctypes.c_void_p
    number = ctypes.POINTER(ctypes.c_int64)
    signatures: dict[str, tuple[type | None, list[object]]] = {
        "bapq_abi_version": (ctypes.c_int32, []),
        "bapq_store_open": (ctypes.c_int32, [ctypes.POINTER(_Bank), ctypes.POINTER(store), error]),
        "bapq_store_close": (ctypes.c_int32, [store, error]),
        "bapq_store_publish": (ctypes.c_int32, [store, ctypes.c_char_p, error]),
        "bapq_store_read_stats": (None, [store, ctypes.POINTER(_StoreStats)]),
        "bapq_run_begin": (ctypes.c_int32, [store, number, number, error]),
        "bapq_run_end": (ctypes.c_int32, [ctypes.c_int64, error]),
        "bapq_kernels_name": (ctypes.c_char_p, []),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    found = library.bapq_abi_version()
    if found != _ABI_VERSION:
        raise errors.PlatformError(
            f"libbapq has ABI version {found}, this package needs {_ABI_VERSION}: "
            "reinstall bapq-edge"
        )
    return library


def kernels_name() -> str:
    """Name of the kernel family in use: scalar, avx2, avx512vnni, neon or neondot.

    Raises PlatformError when BAPQ_ISA in the environment names one that this CPU cannot run.
    """
    name: bytes = _library().bapq_kernels_name()
    if not name:
        wanted = os.environ.get("BAPQ_ISA")
        raise errors.PlatformError(f"BAPQ_ISA={wanted}: this CPU has no such kernels; unset it")
    return name.decode()


class Store:
    """The native chunk store of one bank.

    Not usable after `close`; the session sees to that, and that no run is open by then.
    """

    def __init__(self, bank: Bank, threads: int) -> None:
        """Open the plane files of the bank. Nothing is read before the first `publish`."""
        self._bank = bank
        self._library = _library()
        self._handle = ctypes.c_void_p()
        native, keep_alive = self._describe(bank, threads)
        error = _Error()
        self._library.bapq_store_open(
            ctypes.byref(native), ctypes.byref(self._handle), ctypes.byref(error)
        )
        del keep_alive
        self._check(error)

    @staticmethod
    def _describe(bank: Bank, threads: int) -> tuple[_Bank, list[object]]:
        layers = bank.manifest.layers
        table = (_Layer * len(layers))()
        for entry, layer in zip(table, layers, strict=True):
            entry.rows = layer.rows
            entry.columns = layer.columns
            entry.chunk_rows = layer.chunk_rows
            entry.first_chunk = layer.first_chunk
            entry.residual_steps = layer.residual_steps
            entry.has_bias = layer.has_bias
            for index, plane in enumerate(_PLANE_ORDER):
                if plane in SCALED_PLANES:
                    entry.scale_columns[index] = layer.scale_columns.get(SCALED_PLANES[plane], 0)
        native = _Bank(
            layers=table,
            layer_count=len(layers),
            chunk_count=sum(layer.chunk_count for layer in layers),
            threads=threads,
        )
        keep_alive: list[object] = [table]
        for index, plane in enumerate(_PLANE_ORDER):
            if plane not in bank.planes:
                continue
            native.plane_path[index] = os.fsencode(bank.plane_path(plane))
            extents = np.ascontiguousarray(bank.chunks(plane))
            keep_alive.append(extents)
            native.extents[index] = extents.ctypes.data
        return native, keep_alive

    def publish(self, levels: Sequence[Level]) -> None:
        """Make `levels`, one per chunk, the plan of every run that begins from now on.

        Plans are numbered from 1 in the order of their publication.

        Reads the missing planes first; on failure the old plan stays. Raises UnknownLevelError,
        BankIntegrityError, BankTruncatedError or StorageError.
        """
        error = _Error()
        self._library.bapq_store_publish(self._handle, bytes(levels), ctypes.byref(error))
        self._check(error)

    def begin_run(self) -> tuple[int, int]:
        """Begin a run on the published plan.

        Returns its ticket, the value of the graph input "bapq.run", and the plan's number.
        """
        ticket = ctypes.c_int64()
        number = ctypes.c_int64()
        error = _Error()
        self._library.bapq_run_begin(
            self._handle, ctypes.byref(ticket), ctypes.byref(number), ctypes.byref(error)
        )
        self._check(error)
        return ticket.value, number.value

    def end_run(self, ticket: int) -> None:
        """End the run. Raises the error of the first operator that failed in it."""
        error = _Error()
        self._library.bapq_run_end(ticket, ctypes.byref(error))
        self._check(error)

    def stats(self) -> StoreStats:
        """What the store holds right now."""
        native = _StoreStats()
        self._library.bapq_store_read_stats(self._handle, ctypes.byref(native))
        return StoreStats(*(getattr(native, name) for name, _ in _StoreStats._fields_))

    def close(self) -> None:
        """Give all memory back."""
        error = _Error()
        self._library.bapq_store_close(self._handle, ctypes.byref(error))
        self._check(error)

    def _check(self, error: _Error) -> None:
        if error.status == 0:
            return
        message = error.message.decode(errors="replace")
        if 0 <= error.layer < len(self._bank.manifest.layers):
            name = self._bank.manifest.layers[error.layer].name
            message = f"{self._bank.path}: layer {name}: {message}"
        kind = _STATUS_ERRORS[error.status]
        if error.status in (3, 4, 5):
            message += "; check the bank with 'bapq verify', and the storage it is on"
        raised = kind(message)
        if isinstance(raised, OSError):
            raised.errno = error.os_errno or errno.EIO
        raise raised


assert set(_PLANE_ORDER) == set(PLANES) and len(LEVELS) == len(PLANES)
