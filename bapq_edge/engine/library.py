"""libbapq through ctypes: where it is, and the mirror of native/include/bapq.h."""

from __future__ import annotations

import ctypes
import os
import struct
from enum import IntEnum
from functools import cache
from pathlib import Path

import numpy as np

from ..bank.layout import PLANES
from ..errors import PlatformError

__all__ = [
    "TRACE_EVENT",
    "TRACE_KINDS",
    "BankStruct",
    "ErrorStruct",
    "LayerStruct",
    "PlanStruct",
    "ReportStruct",
    "StatsStruct",
    "Status",
    "kernels_name",
    "library_path",
    "load_library",
]

_ABI_VERSION = 10

TRACE_KINDS = ("read", "rows", "wait")
"""The reader thread read a chunk, an operator read rows of one, an operator waited."""

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
"""One event of a trace: `bapq_trace_event`."""


class Status(IntEnum):
    """`bapq_status`: how a call went."""

    OK = 0
    ARGUMENT = 1
    """A caller's mistake: a wrong index, shape or level."""
    NO_MEMORY = 2
    """The system refused memory."""
    IO = 3
    """A read failed; `os_errno` says how."""
    TRUNCATED = 4
    """A plane file ends before the chunk does."""
    CHECKSUM = 5
    """The bytes of a chunk differ from their checksum."""
    NO_LEVEL = 6
    """A chunk cannot run at the level that a plan gives it."""
    NO_KERNEL = 7
    """BAPQ_ISA names kernels that this CPU cannot run."""


class ErrorStruct(ctypes.Structure):
    """`bapq_error`: what went wrong, and where."""

    _fields_ = (
        ("status", ctypes.c_int32),
        ("os_errno", ctypes.c_int32),
        ("layer", ctypes.c_int32),
        ("chunk", ctypes.c_int32),
        ("message", ctypes.c_char * 240),
    )


class LayerStruct(ctypes.Structure):
    """`bapq_layer`: one layer of the bank."""

    _fields_ = (
        ("rows", ctypes.c_int32),
        ("stored_rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("chunk_rows", ctypes.c_int32),
        ("first_chunk", ctypes.c_int32),
        ("residual_steps", ctypes.c_int32),
        ("has_bias", ctypes.c_int32),
        ("gathered", ctypes.c_int32),
        ("depthwise", ctypes.c_int32),
        ("read_by_row", ctypes.c_int32),
        ("levels", ctypes.c_int32),
        ("scale_columns", ctypes.c_int32 * len(PLANES)),
        ("row_order", ctypes.c_void_p),
        ("dropped_bias", ctypes.c_void_p),
    )


class BankStruct(ctypes.Structure):
    """`bapq_bank`: the plane files and what is in them."""

    _fields_ = (
        ("plane_path", ctypes.c_char_p * len(PLANES)),
        ("extents", ctypes.c_void_p * len(PLANES)),
        ("layers", ctypes.POINTER(LayerStruct)),
        ("layer_count", ctypes.c_int32),
        ("chunk_count", ctypes.c_int32),
        ("direct", ctypes.c_int32),
        ("row_cache_slots", ctypes.c_int32),
    )


class PlanStruct(ctypes.Structure):
    """`bapq_plan_request`: the plan to publish."""

    _fields_ = (
        ("levels", ctypes.c_char_p),
        ("pinned", ctypes.c_char_p),
        ("kept", ctypes.c_char_p),
        ("region", ctypes.c_int32),
        ("ring_bytes", ctypes.c_int64),
        ("home_limit_bytes", ctypes.c_int64),
        ("threads", ctypes.c_int32),
    )


class StatsStruct(ctypes.Structure):
    """`bapq_store_stats`: what the store holds."""

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


class TimesStruct(ctypes.Structure):
    """`bapq_times`: what reading and computing took."""

    _fields_ = (
        ("runs", ctypes.c_int64),
        ("read_bytes", ctypes.c_int64),
        ("read_ns", ctypes.c_int64),
        ("read_cpu_ns", ctypes.c_int64),
    )


class ReportStruct(ctypes.Structure):
    """`bapq_run_report`: how a run went."""

    _fields_ = (
        ("plan_number", ctypes.c_int64),
        ("rss_bytes", ctypes.c_int64),
        ("weight_bytes", ctypes.c_int64),
        ("degraded", ctypes.c_int32),
        ("degraded_by", ErrorStruct),
    )


def library_path() -> Path:
    """Path of libbapq, inside the installed package.

    Raises PlatformError on a 32-bit Python or when the library is not there.
    """
    if struct.calcsize("P") != 8:
        raise PlatformError(
            "this Python is 32-bit, BAPQ-Edge needs 64-bit: install the 64-bit Raspberry Pi OS"
        )
    path = _installed_library()
    if path is None:
        raise PlatformError(
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
def load_library() -> ctypes.CDLL:
    """libbapq, its functions typed; the same object at every call. Raises PlatformError."""
    try:
        library = ctypes.CDLL(str(library_path()))
    except OSError as refused:
        raise PlatformError(f"libbapq.so cannot be loaded: {refused}") from None
    error = ctypes.POINTER(ErrorStruct)
    store = ctypes.c_void_p
    number = ctypes.POINTER(ctypes.c_int64)
    signatures: dict[str, tuple[type | None, list[object]]] = {
        "bapq_abi_version": (ctypes.c_int32, []),
        "bapq_plane_name": (ctypes.c_char_p, [ctypes.c_int32]),
        "bapq_store_open": (
            ctypes.c_int32,
            [ctypes.POINTER(BankStruct), ctypes.POINTER(store), error],
        ),
        "bapq_store_owns_operators": (None, [store]),
        "bapq_store_close": (ctypes.c_int32, [store, error]),
        "bapq_store_publish": (ctypes.c_int32, [store, ctypes.POINTER(PlanStruct), error]),
        "bapq_store_add_region": (
            ctypes.c_int32,
            [store, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int32), error],
        ),
        "bapq_store_read_stats": (None, [store, ctypes.POINTER(StatsStruct)]),
        "bapq_store_take_times": (None, [store, ctypes.POINTER(TimesStruct), ctypes.c_void_p]),
        "bapq_store_trace": (ctypes.c_int32, [store, ctypes.c_int64, error]),
        "bapq_store_trace_read": (
            ctypes.c_int64,
            [store, ctypes.c_void_p, ctypes.c_int64, number],
        ),
        "bapq_run_begin": (ctypes.c_int32, [store, ctypes.c_int32, number, error]),
        "bapq_run_end": (ctypes.c_int32, [ctypes.c_int64, ctypes.POINTER(ReportStruct), error]),
        "bapq_kernels_name": (ctypes.c_char_p, []),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    found = library.bapq_abi_version()
    if found != _ABI_VERSION:
        raise PlatformError(
            f"libbapq has ABI version {found}, this package needs {_ABI_VERSION}: "
            "reinstall bapq-edge"
        )
    planes = [library.bapq_plane_name(index) for index in range(len(PLANES) + 1)]
    if planes != [*map(str.encode, PLANES), None]:
        raise PlatformError(
            f"libbapq has planes {planes}, this package needs {[*PLANES]}: reinstall bapq-edge"
        )
    return library


def kernels_name() -> str:
    """Name of the kernel family in use: scalar, avx2, avx512vnni, neon or neondot.

    Raises PlatformError when BAPQ_ISA in the environment names one that this CPU cannot run.
    """
    name: bytes = load_library().bapq_kernels_name()
    if not name:
        wanted = os.environ.get("BAPQ_ISA")
        raise PlatformError(f"BAPQ_ISA={wanted}: this CPU has no such kernels; unset it")
    return name.decode()
