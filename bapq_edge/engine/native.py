"""libbapq through ctypes: the mirror of native/include/bapq.h, its errors as exceptions."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bapq_edge import errors
from bapq_edge.bank.layout import LEVELS, PLANES, SCALED_PLANES
from bapq_edge.bank.reader import Bank
from bapq_edge.errors import BapqError

__all__ = [
    "TRACE_EVENT",
    "TRACE_KINDS",
    "RunReport",
    "Store",
    "StoreStats",
    "kernels_name",
    "library_path",
]

_ABI_VERSION = 7
_NO_LIMIT = 2**62
_ROW_CACHE_SLOTS = 64
_STORAGE_STATUSES = (3, 4, 5)

TRACE_KINDS = ("read", "rows", "wait")
"""the reader thread read a chunk, an operator read rows of one, an operator waited"""
TRACE_EVENT = np.dtype(
    [
        ("kind", np.int32),  # index into TRACE_KINDS
        ("chunk", np.int32),
        ("plane", np.int32),  # index into PLANES, -1: a wait
        ("status", np.int32),  # 0: the read succeeded
        ("start_ns", np.int64),  # as time.monotonic_ns()
        ("end_ns", np.int64),
        ("bytes", np.int64),
    ]
)

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
        ("stored_rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("chunk_rows", ctypes.c_int32),
        ("first_chunk", ctypes.c_int32),
        ("residual_steps", ctypes.c_int32),
        ("has_bias", ctypes.c_int32),
        ("gathered", ctypes.c_int32),
        ("read_by_row", ctypes.c_int32),
        ("levels", ctypes.c_int32),
        ("scale_columns", ctypes.c_int32 * len(PLANES)),
        ("row_order", ctypes.c_void_p),
        ("dropped_bias", ctypes.c_void_p),
    )


class _Bank(ctypes.Structure):
    _fields_ = (
        ("plane_path", ctypes.c_char_p * len(PLANES)),
        ("extents", ctypes.c_void_p * len(PLANES)),
        ("layers", ctypes.POINTER(_Layer)),
        ("layer_count", ctypes.c_int32),
        ("chunk_count", ctypes.c_int32),
        ("direct", ctypes.c_int32),
        ("row_cache_slots", ctypes.c_int32),
    )


class _PlanRequest(ctypes.Structure):
    _fields_ = (
        ("levels", ctypes.c_char_p),
        ("pinned", ctypes.c_char_p),
        ("kept", ctypes.c_char_p),
        ("region", ctypes.c_int32),
        ("ring_bytes", ctypes.c_int64),
        ("home_limit_bytes", ctypes.c_int64),
        ("threads", ctypes.c_int32),
    )


class _StoreStats(ctypes.Structure):
    _fields_ = (
        ("home_bytes", ctypes.c_int64),
        ("ring_bytes", ctypes.c_int64),
        ("row_cache_bytes", ctypes.c_int64),
        ("row_cache_limit_bytes", ctypes.c_int64),
        ("read_bytes", ctypes.c_int64),
        ("wait_ns", ctypes.c_int64),
        ("scratch_bytes", ctypes.c_int64),
        ("live_plans", ctypes.c_int64),
    )


class _RunReport(ctypes.Structure):
    _fields_ = (
        ("plan_number", ctypes.c_int64),
        ("wait_ns", ctypes.c_int64),
        ("rss_bytes", ctypes.c_int64),
        ("weight_bytes", ctypes.c_int64),
        ("degraded", ctypes.c_int32),
        ("degraded_by", _Error),
    )


@dataclass(frozen=True)
class StoreStats:
    """What the native store holds right now."""

    home_bytes: int
    """bytes of the pinned chunks in memory, of all plans that are alive"""
    ring_bytes: int
    """buffer of the chunks that pass through, as far as touched"""
    row_cache_bytes: int
    """buffer of embedding rows, as far as touched"""
    row_cache_limit_bytes: int
    """all of that buffer"""
    read_bytes: int
    """bytes read from storage since the store was opened"""
    wait_ns: int
    """nanoseconds that operators waited for reads, all runs together"""
    scratch_bytes: int
    """bytes of the operators' buffers, all open runs together"""
    live_plans: int
    """the published plan and those that open runs still hold"""


@dataclass(frozen=True)
class RunReport:
    """How a run went."""

    plan_number: int
    """plans are numbered from 1 in the order of their publication"""
    wait_ns: int
    """nanoseconds that the run's operators waited for reads"""
    rss_bytes: int
    """of the process when the run ended, its buffers still there; 0: the system does not tell"""
    weight_bytes: int
    """of that: pinned chunks, ring and row cache"""
    degraded_chunks: int
    """chunks that ran below their level because a read failed"""
    degraded_by: BapqError | None
    """the first of those failures"""


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
        "bapq_plane_name": (ctypes.c_char_p, [ctypes.c_int32]),
        "bapq_store_open": (ctypes.c_int32, [ctypes.POINTER(_Bank), ctypes.POINTER(store), error]),
        "bapq_store_close": (ctypes.c_int32, [store, error]),
        "bapq_store_publish": (ctypes.c_int32, [store, ctypes.POINTER(_PlanRequest), error]),
        "bapq_store_add_region": (
            ctypes.c_int32,
            [store, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int32), error],
        ),
        "bapq_store_read_stats": (None, [store, ctypes.POINTER(_StoreStats)]),
        "bapq_store_trace": (ctypes.c_int32, [store, ctypes.c_int64, error]),
        "bapq_store_trace_read": (
            ctypes.c_int64,
            [store, ctypes.c_void_p, ctypes.c_int64, number],
        ),
        "bapq_run_begin": (ctypes.c_int32, [store, number, error]),
        "bapq_run_end": (ctypes.c_int32, [ctypes.c_int64, ctypes.POINTER(_RunReport), error]),
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
    planes = [library.bapq_plane_name(index) for index in range(len(PLANES) + 1)]
    if planes != [*map(str.encode, PLANES), None]:
        raise errors.PlatformError(
            f"libbapq has planes {planes}, this package needs {[*PLANES]}: reinstall bapq-edge"
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

    def __init__(self, bank: Bank, *, direct: bool = False) -> None:
        """Open the plane files of the bank; `direct` reads around the page cache.

        Nothing is read before the first `publish`.
        """
        self._bank = bank
        self._library = _library()
        self._handle = ctypes.c_void_p()
        self._trace = np.empty(0, TRACE_EVENT)
        native, keep_alive = self._describe(bank, direct)
        error = _Error()
        self._library.bapq_store_open(
            ctypes.byref(native), ctypes.byref(self._handle), ctypes.byref(error)
        )
        del keep_alive
        self._check(error)

    @staticmethod
    def _describe(bank: Bank, direct: bool) -> tuple[_Bank, list[object]]:
        layers = bank.manifest.layers
        table = (_Layer * len(layers))()
        keep_alive: list[object] = [table]
        for entry, layer in zip(table, layers, strict=True):
            entry.rows = layer.rows
            entry.stored_rows = layer.stored_rows
            entry.columns = layer.columns
            entry.chunk_rows = layer.chunk_rows
            entry.first_chunk = layer.first_chunk
            entry.residual_steps = layer.residual_steps
            entry.has_bias = layer.has_bias
            entry.gathered = "Gather" in layer.operators
            entry.read_by_row = layer.operators == ("Gather",)
            entry.levels = sum(1 << LEVELS.index(level) for level in layer.levels)
            for index, plane in enumerate(PLANES):
                if plane in SCALED_PLANES:
                    entry.scale_columns[index] = layer.scale_columns.get(SCALED_PLANES[plane], 0)
            for name, rows, dtype in (
                ("row_order", bank.row_order(layer), np.int32),
                ("dropped_bias", bank.dropped_bias(layer), np.float32),
            ):
                if rows is not None:
                    keep_alive.append(values := np.ascontiguousarray(rows, dtype))
                    setattr(entry, name, values.ctypes.data)
        native = _Bank(
            layers=table,
            layer_count=len(layers),
            chunk_count=sum(layer.chunk_count for layer in layers),
            direct=direct,
            row_cache_slots=_ROW_CACHE_SLOTS,
        )
        for index, plane in enumerate(PLANES):
            if plane not in bank.planes:
                continue
            native.plane_path[index] = os.fsencode(bank.plane_path(plane))
            extents = np.ascontiguousarray(bank.chunks(plane))
            keep_alive.append(extents)
            native.extents[index] = extents.ctypes.data
        return native, keep_alive

    def publish(
        self,
        levels: NDArray[np.uint8],
        pinned: NDArray[np.bool_],
        ring_bytes: int,
        home_limit_bytes: int | None,
        threads: int,
        *,
        kept: NDArray[np.uint8] | None = None,
        region: int | None = None,
    ) -> None:
        """Make this the plan of every run that begins from now on; reads nothing itself.

        Args:
            levels: (chunks,) 32, 8, 4, 2, 1, or 0: the chunk is neither read nor computed.
            pinned: (chunks,) what stays in memory once it was read.
            ring_bytes: buffer for the rest.
            home_limit_bytes: most bytes of pinned chunks in memory, those of plans that runs in
                flight still hold included; None is no limit.
            threads: most threads that one operator runs on.
            kept: (chunks,) bit p: the p-th of PLANES, if it is in memory, stays there, for plans
                to come too; None: what is not pinned may go.
            region: number of the region whose values stand in for skipped rows.

        Plans are numbered from 1 in the order of their publication. Raises UnknownLevelError for a
        level that a chunk cannot run at, such as 0 without a region or where a Gather reads it.
        """
        request = _PlanRequest(
            levels=levels.astype(np.uint8).tobytes(),
            pinned=pinned.astype(np.uint8).tobytes(),
            kept=None if kept is None else kept.astype(np.uint8).tobytes(),
            region=-1 if region is None else region,
            ring_bytes=ring_bytes,
            home_limit_bytes=_NO_LIMIT if home_limit_bytes is None else home_limit_bytes,
            threads=threads,
        )
        error = _Error()
        self._library.bapq_store_publish(self._handle, ctypes.byref(request), ctypes.byref(error))
        self._check(error)

    def add_region(self, values: NDArray[np.float32]) -> int:
        """Register what stands in for skipped rows in one region of inputs; returns its number.

        `values` is (stored rows of all layers,) in the order of the bank: a row's output, bias
        included, before the clip. Regions are numbered from 0 and last as long as the store.
        """
        rows = sum(layer.stored_rows for layer in self._bank.manifest.layers)
        if values.shape != (rows,):
            raise ValueError(f"a region's values are {values.shape}, expected ({rows},)")
        values = np.ascontiguousarray(values, np.float32)
        region = ctypes.c_int32()
        error = _Error()
        self._library.bapq_store_add_region(
            self._handle, values.ctypes.data, ctypes.byref(region), ctypes.byref(error)
        )
        self._check(error)
        return region.value

    def begin_run(self) -> int:
        """Begin a run on the published plan; the ticket is the graph input "bapq.run"."""
        ticket = ctypes.c_int64()
        error = _Error()
        self._library.bapq_run_begin(self._handle, ctypes.byref(ticket), ctypes.byref(error))
        self._check(error)
        return ticket.value

    def end_run(self, ticket: int) -> RunReport:
        """End the run. Raises the error of the first operator that failed in it."""
        report = _RunReport()
        error = _Error()
        self._library.bapq_run_end(ticket, ctypes.byref(report), ctypes.byref(error))
        self._check(error)
        degraded_by = self._exception(report.degraded_by) if report.degraded else None
        return RunReport(
            report.plan_number,
            report.wait_ns,
            report.rss_bytes,
            report.weight_bytes,
            report.degraded,
            degraded_by,
        )

    def stats(self) -> StoreStats:
        """What the store holds right now."""
        native = _StoreStats()
        self._library.bapq_store_read_stats(self._handle, ctypes.byref(native))
        return StoreStats(*(getattr(native, name) for name, _ in _StoreStats._fields_))

    def trace_start(self, capacity: int) -> None:
        """Record reads and waits from now on; what was recorded and not read is forgotten.

        `capacity` is the number of events that are kept until they are read; 0 ends the recording.
        """
        error = _Error()
        self._library.bapq_store_trace(self._handle, capacity, ctypes.byref(error))
        self._check(error)
        self._trace = np.empty(capacity, TRACE_EVENT)

    def trace_read(self) -> tuple[NDArray[np.void], int]:
        """What was recorded since the last call, and how many events were lost since the start.

        The events are (count,) TRACE_EVENT in the order in which they ended, valid until the next
        call. An event is lost when `capacity` of them wait to be read.
        """
        lost = ctypes.c_int64()
        count = self._library.bapq_store_trace_read(
            self._handle, self._trace.ctypes.data, len(self._trace), ctypes.byref(lost)
        )
        return self._trace[:count], lost.value

    def close(self) -> None:
        """Give all memory back."""
        error = _Error()
        self._library.bapq_store_close(self._handle, ctypes.byref(error))
        self._check(error)

    def _check(self, error: _Error) -> None:
        if error.status != 0:
            raise self._exception(error)

    def _exception(self, error: _Error) -> BapqError:
        message = error.message.decode(errors="replace")
        if 0 <= error.layer < len(self._bank.manifest.layers):
            name = self._bank.manifest.layers[error.layer].name
            message = f"{self._bank.path}: layer {name}: {message}"
        if error.status in _STORAGE_STATUSES:
            message += "; check the bank with 'bapq verify', and the storage it is on"
        exception = _STATUS_ERRORS[error.status](message)
        if isinstance(exception, OSError):
            exception.errno = error.os_errno or errno.EIO
        return exception
