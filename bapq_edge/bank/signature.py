"""Signed banks: who made a bank, by Ed25519 over its manifest, in the file formats of minisign.

The manifest holds the digests of everything else, so a signature over its bytes is one over the
bank: `manifest.json.minisig`, beside it, is what `minisign -Sm manifest.json` would write, and
`minisign -Vm manifest.json` checks it too. Keys are made, and banks signed, on the host
(`bapq_tools.signing`).

The curve's arithmetic is that of the package `cryptography`, which the extra [sign] brings.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ..errors import BankSignatureError, KeyFileError, MissingExtraError
from ..input_files import input_file_errors
from .files import blake2b, exists, file_size, inside, read_at
from .manifest import MANIFEST_FILE, SIGNATURE_FILE
from .reader import Bank

__all__ = [
    "MAX_SIGNATURE_BYTES",
    "Signature",
    "TrustedKey",
    "check_signature",
    "ed25519",
    "has_signature",
    "key_lines",
    "load_key",
    "prehash",
    "signature_bytes",
]

MAX_SIGNATURE_BYTES = 8 << 10
"""Most bytes of a signature's file, as of a key's: comments are a line each."""

_UNTRUSTED = "untrusted comment: "
_TRUSTED = "trusted comment: "
_KEY_KIND = b"Ed"
_PREHASHED_KIND = b"ED"
_PLAIN_KIND = b"Ed"  # of minisign before 0.10, and of signify
_ID_BYTES, _PUBLIC_BYTES, _SIGNATURE_BYTES = 8, 32, 64


@dataclass(frozen=True)
class TrustedKey:
    """A public key."""

    id: bytes
    """(8,) that tells keys apart."""
    public: bytes
    """(32,) of Ed25519."""

    @property
    def name(self) -> str:
        """The id as minisign writes it: 16 hexadecimal digits."""
        return self.id[::-1].hex().upper()


@dataclass(frozen=True)
class Signature:
    """A signature that was checked."""

    key: TrustedKey
    comment: str
    """The trusted comment: what the signer wrote, under the signature too."""

    def __str__(self) -> str:
        return f"signed with key {self.key.name}: {self.comment}"


def load_key(key: str | os.PathLike[str]) -> TrustedKey:
    """A public key: its file, or its line of 56 characters itself, such as "RWQf6LRC...".

    Raises KeyFileError for what is no such key, InputFileError for a file that cannot be read.
    """
    if isinstance(key, str) and not os.path.exists(key) and _is_line(key):
        return _parsed_key(key, "trusted_key")
    path = os.fspath(key)
    with input_file_errors(path), open(path, "rb") as file:
        data = file.read(MAX_SIGNATURE_BYTES + 1)
    lines = key_lines(data, path, "a public key of minisign")
    return _parsed_key(lines[-1] if 1 <= len(lines) <= 2 else "", path)


def _is_line(text: str) -> bool:
    data = _decoded(text)
    return data is not None and len(data) == len(_KEY_KIND) + _ID_BYTES + _PUBLIC_BYTES


def _parsed_key(line: str, where: str) -> TrustedKey:
    data = _decoded(line)
    if data is None or not _is_line(line) or not data.startswith(_KEY_KIND):
        raise KeyFileError(
            f"{where} is no public key of minisign: give its .pub file, or the line of 56 "
            "characters in it"
        )
    kind = len(_KEY_KIND)
    return TrustedKey(data[kind : kind + _ID_BYTES], data[kind + _ID_BYTES :])


def key_lines(data: bytes, where: str, what: str) -> list[str]:
    """The lines of a file of minisign's. Raises KeyFileError for what is no short text."""
    try:
        if len(data) > MAX_SIGNATURE_BYTES:
            raise ValueError
        return data.decode().splitlines()
    except ValueError:
        raise KeyFileError(f"{where} is not {what}: name the right file") from None


def _decoded(line: str) -> bytes | None:
    try:
        return base64.b64decode(line, validate=True)
    except (binascii.Error, ValueError):
        return None


def has_signature(directory: Path) -> bool:
    """Whether a bank's directory has a signature, whatever it is worth."""
    return exists(directory / SIGNATURE_FILE, follow_symlinks=False)


def signature_bytes(directory: Path) -> bytes | None:
    """The signature's file of a bank; None where there is none. Raises BankError, StorageError."""
    if not has_signature(directory):
        return None
    target = inside(os.path.realpath(directory), SIGNATURE_FILE)
    size = file_size(target)
    if size > MAX_SIGNATURE_BYTES:
        raise BankSignatureError(
            f"{directory / SIGNATURE_FILE} has {size} bytes, a signature at most "
            f"{MAX_SIGNATURE_BYTES}: sign the bank again"
        )
    return read_at(target, 0, size)


def check_signature(bank: Bank, key: TrustedKey) -> Signature:
    """Check that a bank's manifest was signed with the key.

    What the manifest vouches for is checked by `Bank.check_digests`, or by `verify`.

    Raises BankSignatureError where it was not, MissingExtraError, StorageError.
    """
    data = signature_bytes(bank.path)
    if data is None:
        raise BankSignatureError(
            f"{bank.path} is not signed, key {key.name} is required: sign it with 'bapq sign', or "
            "get the signed one"
        )
    where = bank.path / SIGNATURE_FILE
    kind, key_id, signature, comment, overall = _parsed(data, where)
    if key_id != key.id:
        other = TrustedKey(key_id, b"").name
        raise BankSignatureError(
            f"{bank.path} is signed with key {other}, key {key.name} is required: do not use it"
        )
    manifest = bank.manifest_bytes()
    message = prehash(manifest) if kind == _PREHASHED_KIND else manifest
    for signed, over, what in (
        (signature, message, MANIFEST_FILE),
        (overall, signature + comment.encode(), "the trusted comment"),
    ):
        if not _is_signed(key, signed, over):
            raise BankSignatureError(
                f"{bank.path}: {what} is not what was signed with key {key.name}: do not use this "
                "bank"
            )
    return Signature(key, comment)


def prehash(manifest: bytes) -> bytes:
    """What is signed: BLAKE2b-512 of the manifest."""
    return blake2b(manifest, digest_size=64).digest()


def _parsed(data: bytes, where: Path) -> tuple[bytes, bytes, bytes, str, bytes]:
    """Kind, key's id, signature, trusted comment and the signature over both."""
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError:
        lines = []
    if len(lines) == 4 and lines[0].startswith(_UNTRUSTED) and lines[2].startswith(_TRUSTED):
        first, overall = _decoded(lines[1]) or b"", _decoded(lines[3]) or b""
        kind = first[: len(_KEY_KIND)]
        whole = len(first) == len(kind) + _ID_BYTES + _SIGNATURE_BYTES
        if whole and len(overall) == _SIGNATURE_BYTES and kind in (_PREHASHED_KIND, _PLAIN_KIND):
            start = len(kind) + _ID_BYTES
            comment = lines[2][len(_TRUSTED) :]
            return kind, first[len(kind) : start], first[start:], comment, overall
    raise BankSignatureError(f"{where} is not a signature of minisign: sign the bank again")


def _is_signed(key: TrustedKey, signature: bytes, message: bytes) -> bool:
    curve = ed25519()
    from cryptography.exceptions import InvalidSignature  # there, as the curve is

    try:
        curve.Ed25519PublicKey.from_public_bytes(key.public).verify(signature, message)
    except InvalidSignature:
        return False
    return True


def ed25519() -> ModuleType:
    """The curve's arithmetic, of the package `cryptography`. Raises MissingExtraError."""
    try:
        return importlib.import_module("cryptography.hazmat.primitives.asymmetric.ed25519")
    except ImportError as error:
        raise MissingExtraError(
            f"signatures need the package cryptography ({error}): pip install 'bapq-edge[sign]'"
        ) from error
