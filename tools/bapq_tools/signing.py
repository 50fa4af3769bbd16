"""Keys that banks are signed with, and signing, in the file formats of minisign.

A secret key made here can be used by `minisign`, and the other way round:

    untrusted comment: ...
    base64 of  "Ed" kdf "B2" salt[32] opslimit[8] memlimit[8]  id[8] secret[64] checksum[32]

`kdf` is "Sc" where the last three are under a password (XOR with scrypt's output), zeros otherwise.
"""

from __future__ import annotations

import base64
import hashlib
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from bapq_edge.bank.files import exists
from bapq_edge.bank.manifest import SIGNATURE_FILE, UNFINISHED_SIGNATURE
from bapq_edge.bank.reader import Bank
from bapq_edge.bank.signature import (
    MAX_SIGNATURE_BYTES,
    Signature,
    TrustedKey,
    ed25519,
    key_lines,
    prehash,
)
from bapq_edge.bank.staging import lock_directory, storage_errors, sync_directory
from bapq_edge.bank.verify import verify
from bapq_edge.errors import (
    BankIntegrityError,
    KeyFileError,
    OutOfMemoryError,
    RequestError,
    StorageError,
)
from bapq_edge.input_files import input_file_errors

__all__ = ["SecretKey", "is_under_password", "load_secret_key", "make_key", "sign"]

_HEAD = struct.Struct("<2s2s2s32sQQ")
_BODY = struct.Struct("<8s64s32s")
_KIND, _SCRYPT, _NO_KDF, _CHECKSUM = b"Ed", b"Sc", b"\0\0", b"B2"

_OPS_LIMIT, _MEMORY_LIMIT_BYTES = 1 << 25, 1 << 30
"""Of keys made here: what minisign takes, a second and 1 GiB."""


@dataclass(frozen=True)
class SecretKey:
    """A key to sign with. Its text never shows the secret."""

    public: TrustedKey
    seed: bytes
    """(32,) of Ed25519."""

    def __repr__(self) -> str:
        """Tell the id only."""
        return f"<SecretKey {self.public.name}>"


# ---- keys ----


def make_key(
    path: str | os.PathLike[str],
    password: str | None,
    *,
    ops_limit: int = _OPS_LIMIT,
    memory_limit_bytes: int = _MEMORY_LIMIT_BYTES,
) -> TrustedKey:
    """Make a key: the secret one in `path`, for its owner's eyes only, the public one beside it.

    `path` ends in .key, and the public key's file in .pub. With a password the secret key is of
    no use to who has only the file; None: without one. The limits are what finding the key of the
    password takes, as libsodium counts it.

    Raises RequestError, StorageError where one of them exists or cannot be written,
    MissingExtraError.
    """
    secret_path = Path(path)
    if secret_path.suffix != ".key":
        raise RequestError(f"{secret_path} must end in .key: the public key is then in the .pub")
    public_path = secret_path.with_suffix(".pub")
    for file in (secret_path, public_path):
        if exists(file, follow_symlinks=False):
            raise StorageError(f"{file} is there already: choose another name, keys are not undone")
    private = ed25519().Ed25519PrivateKey.generate()
    seed, public = private.private_bytes_raw(), private.public_key().public_bytes_raw()
    key = SecretKey(TrustedKey(os.urandom(8), public), seed)
    body = _BODY.pack(key.public.id, seed + public, _checksum(key))
    salt = bytes(32)
    if password is not None:
        salt = os.urandom(32)
        body = _masked(body, password, salt, ops_limit, memory_limit_bytes)
    else:
        ops_limit = memory_limit_bytes = 0
    kdf = _NO_KDF if password is None else _SCRYPT
    head = _HEAD.pack(_KIND, kdf, _CHECKSUM, salt, ops_limit, memory_limit_bytes)
    name = key.public.name
    with storage_errors(secret_path):
        _write_new(secret_path, f"bapq secret key {name}", head + body, 0o600)
        _write_new(public_path, f"bapq public key {name}", _KIND + key.public.id + public, 0o644)
    return key.public


def _write_new(path: Path, comment: str, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(descriptor, "wb") as file:
        file.write(f"untrusted comment: {comment}\n".encode() + base64.b64encode(data) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def is_under_password(path: str | os.PathLike[str]) -> bool:
    """Whether a secret key wants a password. Raises KeyFileError, InputFileError."""
    return bool(_HEAD.unpack(_read_secret(Path(path))[: _HEAD.size])[1] == _SCRYPT)


def load_secret_key(path: str | os.PathLike[str], password: str | None = None) -> SecretKey:
    """A secret key of minisign or of `make_key`.

    Raises KeyFileError for what is none, or where the password does not fit; InputFileError,
    OutOfMemoryError where the key wants more memory than there is.
    """
    data = _read_secret(Path(path))
    _, kdf, _, salt, ops_limit, memory_limit_bytes = _HEAD.unpack(data[: _HEAD.size])
    body = data[_HEAD.size :]
    if kdf == _SCRYPT:
        if password is None:
            raise KeyFileError(f"{path} is under a password: give it")
        body = _masked(body, password, salt, ops_limit, memory_limit_bytes)
    key_id, secret, checksum = _BODY.unpack(body)
    key = SecretKey(TrustedKey(key_id, secret[32:]), secret[:32])
    unchecked = kdf == _NO_KDF and not any(checksum)  # so minisign writes a key without a password
    if not unchecked and checksum != _checksum(key):
        why = "the password does not fit" if kdf == _SCRYPT else "it is damaged"
        raise KeyFileError(f"{path} cannot be used: {why}")
    return key


def _read_secret(path: Path) -> bytes:
    with input_file_errors(path), path.open("rb") as file:
        text = file.read(MAX_SIGNATURE_BYTES + 1)
    lines = key_lines(text, str(path), "a secret key of minisign")
    try:
        data = base64.b64decode(lines[-1], validate=True) if len(lines) == 2 else b""
    except ValueError:
        data = b""
    kind, kdf, checksum = data[:2], data[2:4], data[4:6]
    known = kind == _KIND and kdf in (_SCRYPT, _NO_KDF) and checksum == _CHECKSUM
    if not known or len(data) != _HEAD.size + _BODY.size:
        raise KeyFileError(f"{path} is not a secret key of minisign: make one with 'bapq keygen'")
    return data


def _checksum(key: SecretKey) -> bytes:
    signed = _KIND + key.public.id + key.seed + key.public.public
    return hashlib.blake2b(signed, digest_size=32).digest()


def _masked(body: bytes, password: str, salt: bytes, ops_limit: int, memory_bytes: int) -> bytes:
    """The body under a password, or out from under it: scrypt as libsodium takes its limits."""
    block = 8
    ops_limit = max(ops_limit, 1 << 15)
    if ops_limit < memory_bytes // 32:
        parallel, most = 1, ops_limit // (block * 4)
    else:
        most = memory_bytes // (block * 128)
        parallel = 0
    cost = 2
    while cost <= most // 2 and cost < 1 << 30:
        cost *= 2
    if parallel == 0:
        parallel = max(1, min(ops_limit // 4 // cost, 0x3FFFFFFF) // block)
    try:
        mask = hashlib.scrypt(
            password.encode(),
            salt=salt,
            n=cost,
            r=block,
            p=parallel,
            dklen=len(body),
            maxmem=128 * block * (cost + parallel + 2) + (1 << 20),
        )
    except (ValueError, MemoryError, OverflowError) as error:
        raise OutOfMemoryError(
            f"the key's password takes {128 * block * cost >> 20} MiB to check: {error}: use a "
            "machine that has them"
        ) from error
    return bytes(a ^ b for a, b in zip(body, mask, strict=True))


# ---- signing ----


def sign(bank: str | os.PathLike[str], key: SecretKey, comment: str | None = None) -> Signature:
    """Sign a bank, after every byte of it was checked; an older signature is replaced.

    `comment` is the trusted comment, one line that is signed too; None: the time, the model and
    the bank's digest. A sign that is killed leaves the older signature, or the new one.

    Raises BankError and its kinds for a bank that is not sound, RequestError for a comment that
    cannot be had, StorageError, MissingExtraError.
    """
    report = verify(bank)
    if not report.ok:
        raise BankIntegrityError(f"{bank} is not signed: {report}")
    opened = Bank.open(bank)
    if comment is None:
        model, digest = opened.manifest.model.name, opened.manifest.digest
        comment = f"timestamp:{int(time.time())}\tmodel:{model}\tdigest:{digest}"
    if len(comment.splitlines()) != 1 or len(comment.encode()) > MAX_SIGNATURE_BYTES // 2:
        raise RequestError(
            f"the comment has {len(comment.splitlines())} lines and {len(comment.encode())} bytes: "
            f"give one line of at most {MAX_SIGNATURE_BYTES // 2} bytes"
        )
    private = ed25519().Ed25519PrivateKey.from_private_bytes(key.seed)
    signature = private.sign(prehash(opened.manifest_bytes()))
    overall = private.sign(signature + comment.encode())
    text = b"\n".join(
        (
            f"untrusted comment: signature of a bank by key {key.public.name}".encode(),
            base64.b64encode(b"ED" + key.public.id + signature),
            b"trusted comment: " + comment.encode(),
            base64.b64encode(overall),
            b"",
        )
    )
    with storage_errors(opened.path):
        _put(opened.path, text)
    return Signature(key.public, comment)


def _put(directory: Path, text: bytes) -> None:
    """Put the signature into the bank in one step."""
    lock = lock_directory(directory)
    try:
        unfinished = directory / UNFINISHED_SIGNATURE
        try:
            with unfinished.open("wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.rename(unfinished, directory / SIGNATURE_FILE)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        sync_directory(directory)
    finally:
        os.close(lock)
