"""The native chunk store: it holds the weights, opens runs on the published plan and ends them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import errors
from ..bank.layout import LEVELS, PLANES, SCALED_PLANES
from ..bank.reader import Bank
from ..errors import BapqError
from .library import (
    TRACE_EVENT,
    BankStruct,
    ErrorStruct,
    LayerStruct,
    PlanStruct,
    ReportStruct,
    StatsStruct,
    Status,
    TimesStruct,
    load_library,
)

__all__ = ["Run", "RunReport", "Store", "StoreStats", "StoreTimes"]

_NO_LIMIT = 2**62
_ROW_CACHE_SLOTS = 64

_STORAGE_STATUSES = (Status.IO, Status.TRUNCATED, Status.CHECKSUM)
_STATUS_ERRORS: dict[int, type[errors.BapqError]] = {
    Status.ARGUMENT: errors.RunInputError,
    Status.NO_MEMORY: errors.OutOfMemoryError,
    Status.IO: errors.StorageError,
    Status.TRUNCATED: errors.BankTruncatedError,
    Status.CHECKSUM: errors.BankIntegrityError,
    Status.NO_LEVEL: errors.UnknownLevelError,
    Status.NO_KERNEL: errors.PlatformError,
}


@dataclass(frozen=True)
class StoreStats:
    """What the native store holds right now."""

    home_bytes: int
    """Bytes of the pinned chunks in memory, those of all living plans of this store; other stores
    of the bank in this process may use the same ones."""
    ring_bytes: int
    """Bytes of the buffer that streamed chunks pass through, as far as it was touched."""
    row_cache_bytes: int
    """Bytes of the buffer of embedding rows, as far as it was touched."""
    row_cache_limit_bytes: int
    """Bytes of the whole buffer of embedding rows."""
    read_bytes: int
    """Bytes read from storage since the store was opened."""
    wait_ns: int
    """Time that operators waited for reads, all runs together."""
    scratch_bytes: int
    """Bytes of the operators' buffers, all open runs together."""
    live_plans: int
    """Number of plans in use: the published one, and those that open runs still hold."""


@dataclass(frozen=True, eq=False)
class StoreTimes:
    """What reading and computing took since it was last asked for."""

    runs: int
    """Number of runs that ended."""
    read_bytes: int
    """Bytes that were read ahead of operators: rows that a Gather asks for are none of them."""
    read_ns: int
    """Time that reading them took."""
    read_cpu_ns: int
    """Time of it on a core: copying and checking."""
    layer_ns: NDArray[np.int64]
    """(layers,): time of all runs together, besides waiting for reads, from asking for the layer to
    asking for the next one."""


class Run:
    """A run that is open: its ticket, and room for what the native calls tell of it.

    Once it has ended, the store begins another one in it: to make that room takes longer than to
    begin a run.
    """

    def __init__(self) -> None:
        """Only the store makes them."""
        self.ticket: NDArray[np.int64] = np.zeros((), np.int64)
        """() int64: the graph input "bapq.run"."""
        number = ctypes.c_int64.from_buffer(self.ticket.data)
        self.report, self.error = ReportStruct(), ErrorStruct()
        self.begin_arguments = ctypes.byref(number), ctypes.byref(self.error)
        self.end_arguments = number, ctypes.byref(self.report), ctypes.byref(self.error)


class RunReport(NamedTuple):
    """How a run went."""

    rss_bytes: int
    """Resident memory of the process when the run ended, its buffers still there; 0: the run was
    not measured, or the system does not tell."""
    weight_bytes: int
    """Bytes of weights in that memory that came since the store was opened: ring, row cache, and
    chunks that are pinned, whichever of the bank's stores in this process pinned them."""
    degraded_chunks: int
    """Number of chunks that ran below their level because a read failed."""
    degraded_by: BapqError | None
    """The first failure of those reads; None: all went well."""


class Store:
    """The native chunk store of one bank. Safe to use from several threads.

    Stores of the same files in a process have their pinned chunks in memory once.

    It must not be used after `close`, nor closed while a run is open: its owner sees to that.
    """

    def __init__(self, bank: Bank, *, direct: bool = False) -> None:
        """Open the plane files of the bank; `direct` reads around the page cache.

        Nothing is read before the first `publish`.
        """
        self._bank = bank
        self._library = load_library()
        self._handle = ctypes.c_void_p()
        self._trace = np.empty(0, TRACE_EVENT)
        self._ended_runs: list[Run] = []
        native, keep_alive = self._describe(bank, direct)
        error = ErrorStruct()
        self._library.bapq_store_open(
            ctypes.byref(native), ctypes.byref(self._handle), ctypes.byref(error)
        )
        del keep_alive
        self._check(error)

    @staticmethod
    def _describe(bank: Bank, direct: bool) -> tuple[BankStruct, list[object]]:
        layers = bank.manifest.layers
        table = (LayerStruct * len(layers))()
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
            entry.depthwise = layer.depthwise
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
        native = BankStruct(
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

        Raises UnknownLevelError for a level that a chunk cannot run at, such as 0 without a region
        or where a Gather reads it.
        """
        request = PlanStruct(
            levels=levels.astype(np.uint8).tobytes(),
            pinned=pinned.astype(np.uint8).tobytes(),
            kept=None if kept is None else kept.astype(np.uint8).tobytes(),
            region=-1 if region is None else region,
            ring_bytes=ring_bytes,
            home_limit_bytes=_NO_LIMIT if home_limit_bytes is None else home_limit_bytes,
            threads=threads,
        )
        error = ErrorStruct()
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
        error = ErrorStruct()
        self._library.bapq_store_add_region(
            self._handle, values.ctypes.data, ctypes.byref(region), ctypes.byref(error)
        )
        self._check(error)
        return region.value

    @contextlib.contextmanager
    def owning_operators(self) -> Iterator[None]:
        """Operators that ONNX Runtime makes on this thread meanwhile compute for this store only.

        A ticket of another store's run is refused by them.
        """
        self._library.bapq_store_owns_operators(self._handle)
        try:
            yield
        finally:
            self._library.bapq_store_owns_operators(None)

    def begin_run(self, *, measured: bool = False) -> Run:
        """Begin a run on the published plan; `measured`: its report tells the process's memory."""
        try:
            run = self._ended_runs.pop()
        except IndexError:
            run = Run()
        if self._library.bapq_run_begin(self._handle, measured, *run.begin_arguments):
            raise self._exception(run.error)
        return run

    def end_run(self, run: Run) -> RunReport:
        """End the run. Raises the error of the first operator that failed in it."""
        if self._library.bapq_run_end(*run.end_arguments):
            raise self._exception(run.error)
        report = run.report
        degraded_by = self._exception(report.degraded_by) if report.degraded else None
        how = RunReport(report.rss_bytes, report.weight_bytes, report.degraded, degraded_by)
        self._ended_runs.append(run)
        return how

    def stats(self) -> StoreStats:
        """What the store holds right now."""
        native = StatsStruct()
        self._library.bapq_store_read_stats(self._handle, ctypes.byref(native))
        return StoreStats(*(getattr(native, name) for name, _ in StatsStruct._fields_))

    def take_times(self) -> StoreTimes:
        """What reading and computing took since the last call."""
        native = TimesStruct()
        layer_ns = np.empty(len(self._bank.manifest.layers), np.int64)
        self._library.bapq_store_take_times(
            self._handle, ctypes.byref(native), layer_ns.ctypes.data
        )
        return StoreTimes(
            native.runs, native.read_bytes, native.read_ns, native.read_cpu_ns, layer_ns
        )

    def trace_start(self, capacity: int) -> None:
        """Record reads and waits from now on; what was recorded and not read is forgotten.

        `capacity` is the number of events that are kept until they are read; 0 ends the recording.
        """
        error = ErrorStruct()
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
        error = ErrorStruct()
        self._library.bapq_store_close(self._handle, ctypes.byref(error))
        self._check(error)

    def _check(self, error: ErrorStruct) -> None:
        if error.status != Status.OK:
            raise self._exception(error)

    def _exception(self, error: ErrorStruct) -> BapqError:
        message = error.message.decode(errors="replace")
        if 0 <= error.layer < len(self._bank.manifest.layers):
            name = self._bank.manifest.layers[error.layer].name
            message = f"{self._bank.path}: layer {name}: {message}"
        if error.status in _STORAGE_STATUSES:
            message += "; check the bank with 'bapq verify', and the storage it is on"
        if error.status == Status.NO_MEMORY:
            message += "; stop other programs, or set a smaller memory_budget"
        kind = _STATUS_ERRORS[error.status]
        if error.os_errno in (errno.EMFILE, errno.ENFILE):
            kind = errors.ResourceError
            message = f"{error.message.decode()}: {kind.more_handles}"
        exception = kind(message)
        if isinstance(exception, OSError):
            fallback = errno.ENOMEM if error.status == Status.NO_MEMORY else errno.EIO
            exception.errno = error.os_errno or fallback
        return exception
