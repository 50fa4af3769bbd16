"""Puts a new bank in the place of an old one: after a power cut one of the two stands there, whole.

What the old bank holds already is not copied again: a file that is the same in both is linked, and
so do chunks that are the same come from the old plane. No file of a bank is ever written in place,
so a link is as good as a copy. Every byte is checked as `verify` checks it, whatever it comes from.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import (
    BankError,
    BankIntegrityError,
    MissingPlaneWarning,
    RequestError,
    StorageError,
    UnknownLevelError,
)
from ..units import format_size
from .files import REPAIR, digest_of, read_at
from .graph_file import check_graph
from .layout import PLANES_OF_LEVEL, Level, Plane
from .manifest import MANIFEST_FILE, SIGNATURE_FILE, FileEntry
from .reader import Bank
from .signature import check_signature, load_key, signature_bytes
from .staging import Staging, aside_of, storage_errors, sync_directory
from .writer import check_is_bank

__all__ = ["InstallReport", "install"]

_SYNC_BYTES = 8 << 20
"""Bytes between two waits for the storage: progress is then true, and what is not written yet
cannot fill the memory of a small board."""

_FILE_SLACK_BYTES = 8 << 10
"""What a file takes besides its bytes: its last block and its place in a directory."""


@dataclass(frozen=True)
class InstallReport:
    """What `install` did; `str()` is one line."""

    path: Path
    model: str
    levels: tuple[Level, ...]
    """Levels that can run, highest first."""
    bytes_copied: int
    """Bytes of the installed bank that were read from the new one."""
    bytes_reused: int
    """Bytes of the installed bank that were taken from the old one."""

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.model}, levels {', '.join(map(str, self.levels))}: "
            f"{format_size(self.bytes_copied)} copied, {format_size(self.bytes_reused)} reused"
        )


@dataclass(frozen=True)
class _Part:
    """A piece of a file that is read and checked as a whole: a chunk, or a small file."""

    offset: int
    size: int
    read: Callable[[], bytes]
    """Reads it from the new bank, and checks it."""
    check: Callable[[bytes], None]
    """Raises BankError unless these are its bytes."""
    old_offset: int | None
    """Where the old bank's file may have it; None: nowhere."""


def install(
    new: str | os.PathLike[str],
    bank: str | os.PathLike[str],
    *,
    levels: Sequence[int] | None = None,
    trusted_key: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
) -> InstallReport:
    """Copy the bank `new` to `bank`, and replace the bank that may stand there in one step.

    A session that is open on the old bank works on with it; a new one takes the new bank.

    Args:
        new: the bank to copy; planes that it lacks are left out.
        bank: where to; a bank or nothing.
        levels: install only the planes that these levels read; None is all that are there.
        trusted_key: public key of minisign, its file or its line, that `new` must be signed with; a
            signature comes along in any case.
        progress: called with the bytes done and those to do.

    Raises:
        BankError and its kinds when `new` is no sound bank, or not signed as it must be, or
            something else stands at `bank`;
        UnknownLevelError, RequestError, StorageError. Nothing is changed then.
    """
    key = None if trusted_key is None else load_key(trusted_key)
    source, staging = Bank.open(new), Staging(Path(bank), check_is_bank)
    if key is not None:
        check_signature(source, key)
    planes = _wanted_planes(source, levels)
    left = os.path.realpath(source.path)
    if left in (str(staging.path), str(aside_of(staging.final))):
        raise RequestError(
            f"{left} is what an update of {staging.final} that was cut off has left: the next "
            "update removes it, so rename it first"
        )
    with storage_errors(staging.final), staging:
        copier = _Copier(source, _old_bank(staging.final), staging.path, progress)
        installed = copier.run(planes)
        staging.commit()
    return InstallReport(
        Path(bank),
        source.manifest.model.name,
        installed.levels,
        copier.bytes_copied,
        copier.bytes_reused,
    )


def _wanted_planes(source: Bank, levels: Sequence[int] | None) -> tuple[Plane, ...]:
    if levels is None:
        return source.planes
    held = ", ".join(map(str, source.levels))
    if not levels:
        raise UnknownLevelError(f"no levels are asked for: name some of {held}")
    for level in levels:
        if level not in source.levels:
            raise UnknownLevelError(f"level {level} is not in {source.path}, which holds {held}")
    # A layer without a level runs at another one, whose planes are then needed.
    wanted = {
        plane
        for layer in source.manifest.layers
        for level in source.levels
        if level in levels
        for plane in PLANES_OF_LEVEL[source.level_of(layer, level)]
    }
    return tuple(plane for plane in source.planes if plane in wanted)


def _old_bank(path: Path) -> Bank | None:
    """The bank that is replaced; None where there is none, or it is damaged."""
    with warnings.catch_warnings(), contextlib.suppress(BankError, StorageError):
        warnings.simplefilter("ignore")
        return Bank.open(path)
    return None


class _Copier:
    """Makes the new bank in an empty directory, from the old one as far as that goes."""

    def __init__(
        self,
        source: Bank,
        old: Bank | None,
        directory: Path,
        progress: Callable[[int, int], None],
    ) -> None:
        self.bytes_copied = 0
        self.bytes_reused = 0
        self._source = source
        self._old = old
        self._old_files = frozenset(old.manifest.small_files if old else ())
        self._directory = directory
        self._progress = progress
        self._total_bytes = 0
        self._linked: set[str] = set()

    def run(self, planes: tuple[Plane, ...]) -> Bank:
        """Make the bank, with these planes, and sync it; returns it as it reads back."""
        manifest = self._source.manifest
        entries = manifest.small_files
        files = {entry.file: entry.bytes for entry in entries}
        files |= {manifest.planes[plane].file: manifest.planes[plane].bytes for plane in planes}
        folders = {(self._directory / file).parent for file in files}
        for folder in sorted(folders):
            folder.mkdir()
        for entry in entries:
            if entry in self._old_files:
                self._link(entry.file)
        for plane in planes:
            if self._is_old_plane(plane):
                self._link(manifest.planes[plane].file)
        # As they are, since a signature is over bytes.
        texts = {MANIFEST_FILE: self._source.manifest_bytes()}
        signature = signature_bytes(self._source.path)
        if signature is not None:
            texts[SIGNATURE_FILE] = signature
        files |= {file: len(text) for file, text in texts.items()}
        self._total_bytes = sum(files.values())
        self._check_space(files)
        for entry in entries:
            self._place(entry.file, partial(self._entry_parts, entry))
        for plane in planes:
            self._place(manifest.planes[plane].file, partial(self._plane_parts, plane))
        for file, text in texts.items():
            self._place(file, partial(_whole, text))
        for folder in folders:
            sync_directory(folder)
        with warnings.catch_warnings():  # Bank.open(new) has told, and `levels` asked for it
            warnings.simplefilter("ignore", MissingPlaneWarning)
            return Bank.open(self._directory)

    def _is_old_plane(self, plane: Plane) -> bool:
        """Whether the old bank has the same plane: the tables hold the digests of its chunks."""
        old, entry = self._old, self._source.manifest.planes[plane]
        return old is not None and plane in old.planes and old.manifest.planes[plane] == entry

    def _link(self, file: str) -> None:
        """Give the old bank's file to the new one, where the file system can."""
        assert self._old is not None
        with contextlib.suppress(OSError):
            os.link(os.path.realpath(self._old.path / file), self._directory / file)
            self._linked.add(file)

    def _check_space(self, files: dict[str, int]) -> None:
        needed = sum(
            size + _FILE_SLACK_BYTES for file, size in files.items() if file not in self._linked
        )
        status = os.statvfs(self._directory)
        free = status.f_bavail * status.f_frsize
        if free < needed:
            raise StorageError(
                f"{self._directory.parent}: {format_size(free)} are free, the bank needs "
                f"{format_size(needed)} more: free some space or install fewer levels"
            )

    def _entry_parts(self, entry: FileEntry) -> list[_Part]:
        def check(data: bytes) -> None:
            if digest_of(data) != entry.blake2b:
                raise BankIntegrityError(f"{entry.file} is not what the manifest says: {REPAIR}")
            if entry in self._source.manifest.graphs:
                check_graph(data, entry.file)

        read = partial(self._source.file_bytes, entry)
        return [_Part(0, entry.bytes, read, check, 0 if entry in self._old_files else None)]

    def _plane_parts(self, plane: Plane) -> Iterator[_Part]:
        source = self._source
        digests = source.chunk_digests(plane)
        places = self._old_places(plane, digests)
        for chunk, row in enumerate(source.chunks(plane)):
            check = partial(source.check_chunk, plane, chunk, digests[chunk].tobytes())
            read = partial(_checked_chunk, source, plane, chunk, check)
            place = int(places[chunk])
            old_offset = None if place < 0 else place
            yield _Part(int(row["offset"]), int(row["bytes"]), read, check, old_offset)

    def _old_places(self, plane: Plane, digests: NDArray[np.uint8]) -> NDArray[np.int64]:
        """(chunks,): where the old plane has a chunk of that digest, most likely; -1: nowhere.

        The first half of a digest finds it; the check of its bytes goes by all of it.
        """
        old = self._old
        if old is None or plane not in old.planes:
            return np.full(len(digests), -1)
        wanted = digests.view("<u8")[:, 0]
        held = old.chunk_digests(plane).view("<u8")[:, 0]
        order = np.argsort(held)
        found = order[np.searchsorted(held, wanted, sorter=order).clip(max=len(held) - 1)]
        return np.where(held[found] == wanted, old.chunks(plane)["offset"][found].astype(int), -1)

    def _place(self, file: str, parts: Callable[[], Iterable[_Part]]) -> None:
        """Put a file into the directory, and sync it."""
        if file in self._linked:
            if self._is_sound(file, parts):
                _sync_file(self._directory / file)
                return
            # The old bank is damaged here.
            self._linked.remove(file)
            os.unlink(self._directory / file)
        unsynced = 0
        with (self._directory / file).open("xb") as output:
            for part in parts():
                data = self._from_old(file, part)
                if data is None:
                    data = part.read()
                    self.bytes_copied += len(data)
                else:
                    self.bytes_reused += len(data)
                output.write(data)
                unsynced += len(data)
                if unsynced >= _SYNC_BYTES:
                    unsynced = 0
                    output.flush()
                    os.fsync(output.fileno())
                self._show()
            output.flush()
            os.fsync(output.fileno())

    def _is_sound(self, file: str, parts: Callable[[], Iterable[_Part]]) -> bool:
        """Whether all of a linked file is as it must be."""
        before = self.bytes_reused
        for part in parts():
            if self._from_old(file, part) is None:
                self.bytes_reused = before
                return False
            self.bytes_reused += part.size
            self._show()
        return True

    def _from_old(self, file: str, part: _Part) -> bytes | None:
        """Bytes of the old bank; None where it does not have them, or they are damaged."""
        if file in self._linked:
            path, offset = self._directory / file, part.offset
        elif self._old is not None and part.old_offset is not None:
            path, offset = self._old.path / file, part.old_offset
        else:
            return None
        try:
            data = read_at(str(path), offset, part.size)
            part.check(data)
        except (BankError, StorageError):
            return None
        return data

    def _show(self) -> None:
        self._progress(self.bytes_copied + self.bytes_reused, self._total_bytes)


def _whole(text: bytes) -> list[_Part]:
    return [_Part(0, len(text), lambda: text, lambda data: None, None)]


def _checked_chunk(source: Bank, plane: Plane, chunk: int, check: Callable[[bytes], None]) -> bytes:
    data = source.read_chunk(plane, chunk)
    check(data)
    return data


def _sync_file(path: Path) -> None:
    """Sync a file of the old bank, which whoever made it may not have done."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
