"""Checks every byte of a bank against every digest, checksum and padding rule."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..errors import BankError
from .layout import Plane
from .reader import Bank
from .signature import check_signature, has_signature, load_key

__all__ = ["FileReport", "VerifyReport", "verify"]


@dataclass(frozen=True)
class FileReport:
    """What `verify` found in one file."""

    file: str
    bytes: int
    problems: int
    first: str
    """Message of the first problem, "" when there is none."""


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found; `str()` is one line."""

    path: Path
    files: tuple[FileReport, ...]
    absent: tuple[str, ...] = ()
    """Files of planes that are not there, which a bank may do without."""
    digest: str = ""
    """The bank's name by its content: `Manifest.digest`."""
    signed_by: str = ""
    """Id of the key that the bank was checked to be signed with; "": none was asked for."""
    comment: str = ""
    """What the signer said, the signature's trusted comment."""
    has_signature: bool = False
    """Whether there is a signature, checked or not."""

    @property
    def ok(self) -> bool:
        """Whether no file has a problem."""
        return not any(file.problems for file in self.files)

    def _signed(self) -> str:
        if self.signed_by:
            return f"signed with key {self.signed_by}: {self.comment}"
        return "signed: check it with --key" if self.has_signature else "not signed"

    def __str__(self) -> str:
        if self.ok:
            size = sum(file.bytes for file in self.files)
            text = f"{self.path}: {len(self.files)} files of {size} bytes in all are intact"
            text += f"; absent: {', '.join(self.absent)}" if self.absent else ""
            return f"{text}; digest {self.digest}; {self._signed()}"
        bad = [file for file in self.files if file.problems]
        return "; ".join(f"{file.file}: problems: {file.problems}: {file.first}" for file in bad)


def verify(
    path: str | os.PathLike[str], *, trusted_key: str | os.PathLike[str] | None = None
) -> VerifyReport:
    """Check a bank down to its last byte, and that it is signed with a key, if one is given.

    `trusted_key` is a public key of minisign: its file, or its line. BankSignatureError where the
    bank is not signed with it. What `Bank.open` refuses is raised as `Bank.open` raises it; damage
    in the graph and in the chunks is counted, file by file. Absent planes give a
    MissingPlaneWarning.
    """
    key = None if trusted_key is None else load_key(trusted_key)
    bank = Bank.open(path)
    signature = None if key is None else check_signature(bank, key)
    manifest = bank.manifest
    # `Bank.open` has just checked these, and the tables below.
    tables = (manifest.sensitivity, *manifest.row_tables.values(), *manifest.boundary_files)
    reports = [
        *(
            _report(graph.file, graph.bytes, iter([partial(bank.graph_bytes, graph)]))
            for graph in manifest.graphs
        ),
        *(_report(table.file, table.bytes, iter(())) for table in tables),
    ]
    for plane in bank.planes:
        entry = bank.manifest.planes[plane]
        reports.append(_report(entry.file, entry.bytes, _plane_checks(bank, plane)))
        reports += (_report(table.file, table.bytes, iter(())) for table in entry.tables)
    return VerifyReport(
        bank.path,
        tuple(reports),
        bank.absent_files,
        manifest.digest,
        signed_by="" if signature is None else signature.key.name,
        comment="" if signature is None else signature.comment,
        has_signature=has_signature(bank.path),
    )


def _report(file: str, size: int, checks: Iterator[Callable[[], object]]) -> FileReport:
    problems, first = 0, ""
    for check in checks:
        try:
            check()
        except BankError as error:
            problems += 1
            first = first or str(error)
    return FileReport(file, size, problems, first)


def _plane_checks(bank: Bank, plane: Plane) -> Iterator[Callable[[], object]]:
    digests = bank.chunk_digests(plane)
    for chunk in range(bank.manifest.chunk_count):
        yield partial(_check_chunk, bank, plane, chunk, digests[chunk].tobytes())


def _check_chunk(bank: Bank, plane: Plane, chunk: int, digest: bytes) -> None:
    bank.check_chunk(plane, chunk, digest, bank.read_chunk(plane, chunk))
