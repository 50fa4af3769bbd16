"""Signed banks: what is signed, what is refused, and that minisign agrees."""

from __future__ import annotations

import io
import shutil
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest

from bapq_edge import Session
from bapq_edge.bank.exchange import unpack
from bapq_edge.bank.install import install
from bapq_edge.bank.manifest import SIGNATURE_FILE, UNFINISHED_SIGNATURE, seal
from bapq_edge.bank.signature import load_key
from bapq_edge.bank.verify import verify
from bapq_edge.errors import (
    BankIntegrityError,
    BankPathError,
    BankSignatureError,
    KeyFileError,
    MissingExtraError,
    RequestError,
    SignatureDroppedWarning,
    StorageError,
)
from bapq_tools.boundary.rewrite import rewrite
from bapq_tools.signing import is_under_password, load_secret_key, make_key, sign
from support.bank_samples import files_of
from support.golden_bank import GOLDEN
from support.streaming import chain_bank, run

RECORDED = Path(__file__).parents[1] / "recorded/minisign"
X = np.ones((2, 96), np.float32)
QUICK = {"ops_limit": 1 << 15, "memory_limit_bytes": 1 << 20}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for name in ("mine", "other"):
        make_key(folder / f"{name}.key", None)
    return folder


@pytest.fixture(scope="module")
def signed_once(tmp_path_factory, keys):
    bank = chain_bank(tmp_path_factory.mktemp("signed") / "m.bank")
    sign(bank, load_secret_key(keys / "mine.key"), "release 7")
    return bank


@pytest.fixture
def signed(tmp_path, signed_once):
    return shutil.copytree(signed_once, tmp_path / "m.bank")


@pytest.mark.parametrize("file", ["golden", "golden_legacy"])
def test_what_minisign_signed_is_taken(tmp_path, file):
    bank = shutil.copytree(GOLDEN, tmp_path / "m.bank")
    shutil.copy(RECORDED / f"{file}.minisig", bank / SIGNATURE_FILE)
    line = (RECORDED / "plain.pub").read_text().splitlines()[1]
    for key in (RECORDED / "plain.pub", str(RECORDED / "plain.pub"), line):
        report = verify(bank, trusted_key=key)
        assert report.ok and report.signed_by == load_key(key).name
        assert report.comment.startswith("recorded, ")


def test_minisigns_key_signs_banks(tmp_path):
    bank = shutil.copytree(GOLDEN, tmp_path / "m.bank")
    sign(bank, load_secret_key(RECORDED / "plain.key"))
    report = verify(bank, trusted_key=RECORDED / "plain.pub")
    assert report.digest in report.comment and "signed with key" in str(report)


@pytest.mark.slow
def test_minisigns_key_under_a_password_signs_banks(tmp_path):
    bank = shutil.copytree(GOLDEN, tmp_path / "m.bank")
    sign(bank, load_secret_key(RECORDED / "password.key", "pw"))
    assert verify(bank, trusted_key=RECORDED / "password.pub").ok


def test_a_key_under_a_password_is_of_no_use_without_it(tmp_path):
    made = make_key(tmp_path / "a.key", "open sesame", **QUICK)
    assert is_under_password(tmp_path / "a.key")
    assert load_secret_key(tmp_path / "a.key", "open sesame").public == made
    assert load_key(tmp_path / "a.pub") == made
    with pytest.raises(KeyFileError, match="the password does not fit"):
        load_secret_key(tmp_path / "a.key", "open, sesame")
    with pytest.raises(KeyFileError, match="is under a password"):
        load_secret_key(tmp_path / "a.key")
    assert (tmp_path / "a.key").stat().st_mode & 0o077 == 0
    with pytest.raises(StorageError, match="is there already"):
        make_key(tmp_path / "a.key", None)


def test_a_session_takes_a_bank_of_the_trusted_key_only(signed, keys, tmp_path):
    with Session(signed, level=8) as session:
        expected = run(session, X)
    with Session(signed, level=8, trusted_key=keys / "mine.pub") as session:
        np.testing.assert_array_equal(run(session, X), expected)
    with pytest.raises(BankSignatureError, match="is required: do not use it"):
        Session(signed, trusted_key=keys / "other.pub")
    (signed / SIGNATURE_FILE).unlink()
    with pytest.raises(BankSignatureError, match=r"is not signed, key .* is required"):
        Session(signed, trusted_key=keys / "mine.pub")


def _forged(data: bytes) -> bytes:
    """Other bytes with the same CRC-32: its polynomial, from the least significant bit on."""
    pattern = int(f"{0x104C11DB7:033b}"[::-1], 2).to_bytes(5, "little")
    changed = bytes(a ^ b for a, b in zip(data, pattern, strict=False)) + data[5:]
    assert changed != data and zlib.crc32(changed) == zlib.crc32(data)
    return changed


def test_weights_that_were_changed_on_purpose_are_found_when_a_key_is_asked_for(signed, keys):
    plane = signed / "planes/p4.bin"
    plane.write_bytes(_forged(plane.read_bytes()))
    with Session(signed, level=4) as session:  # a CRC-32 is for damage
        run(session, X)
    with pytest.raises(BankIntegrityError, match="has BLAKE2b"):
        Session(signed, trusted_key=keys / "mine.pub")


def _edited(old: bytes, new: bytes):
    def edit(bank):
        path = bank / SIGNATURE_FILE
        data = path.read_bytes()
        assert old in data
        path.write_bytes(data.replace(old, new))

    return edit


def _of_another_manifest(bank):
    path = bank / "manifest.json"
    path.write_bytes(seal(path.read_bytes().replace(b'"producer"', b' "producer"')))


def _filled(data: bytes):
    return lambda bank: (bank / SIGNATURE_FILE).write_bytes(data)


def _linked(bank):
    outside = shutil.move(bank / SIGNATURE_FILE, bank.parent / "elsewhere")
    (bank / SIGNATURE_FILE).symlink_to(outside)


@pytest.mark.parametrize(
    ("attack", "error", "message"),
    [
        (_edited(b"release 7", b"release 8"), BankSignatureError, "the trusted comment is not"),
        (_of_another_manifest, BankSignatureError, "manifest.json is not what was signed"),
        (_edited(b"\n", b"\n\n"), BankSignatureError, "is not a signature of minisign"),
        (_filled(b""), BankSignatureError, "is not a signature of minisign"),
        (_filled(b"\xff\xfe\n\n\n\n"), BankSignatureError, "is not a signature of minisign"),
        (_filled(bytes(100_000)), BankSignatureError, "has 100000 bytes, a signature at most"),
        (_linked, BankPathError, "outside the bank"),
    ],
)
def test_forgeries_are_refused_before_anything_is_replaced(
    signed, keys, tmp_path, attack, error, message
):
    attack(signed)
    target = shutil.copytree(GOLDEN, tmp_path / "installed.bank")
    before = files_of(target)
    key = keys / "mine.pub"
    for refuse in (
        lambda: Session(signed, trusted_key=key),
        lambda: verify(signed, trusted_key=key),
        lambda: install(signed, target, trusted_key=key),
    ):
        with pytest.raises(error, match=message):
            refuse()
    assert files_of(target) == before


def test_an_installed_bank_keeps_its_signature_with_fewer_planes_too(signed, keys, tmp_path):
    target = tmp_path / "installed.bank"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        install(signed, target, levels=[2, 1], trusted_key=keys / "mine.pub")
        assert verify(target, trusted_key=keys / "mine.pub").ok
    install(GOLDEN, target)
    assert not (target / SIGNATURE_FILE).exists()
    with pytest.raises(BankSignatureError, match="is not signed"):
        install(GOLDEN, target, trusted_key=keys / "mine.pub")


def test_a_bank_that_is_written_again_says_that_its_signature_is_gone(signed, tmp_path):
    with pytest.warns(SignatureDroppedWarning, match="sign it again"):
        rewrite(signed, signed)
    assert not (signed / SIGNATURE_FILE).exists()


def test_unpacking_says_that_the_signature_stays_behind(signed, tmp_path):
    with pytest.warns(SignatureDroppedWarning, match="sign the bank that you pack"):
        unpack(signed, tmp_path / "tree")


def test_signing_replaces_a_signature_and_what_a_killed_one_left(signed, keys):
    (signed / UNFINISHED_SIGNATURE).write_text("half of a sig")
    sign(signed, load_secret_key(keys / "other.key"))
    assert verify(signed, trusted_key=keys / "other.pub").ok
    assert not (signed / UNFINISHED_SIGNATURE).exists()
    (signed / UNFINISHED_SIGNATURE).write_text("half of a sig")
    install(GOLDEN, signed)  # it does not stand in the way of an update


def test_no_damaged_bank_is_signed_and_no_comment_of_two_lines(signed, keys):
    key = load_secret_key(keys / "mine.key")
    before = (signed / SIGNATURE_FILE).read_bytes()
    with pytest.raises(RequestError, match="the comment has 2 lines"):
        sign(signed, key, "one\ntwo")
    plane = signed / "planes/p4.bin"
    plane.write_bytes(plane.read_bytes()[:-1] + b"x")
    with pytest.raises(BankIntegrityError, match="is not signed"):
        sign(signed, key)
    assert (signed / SIGNATURE_FILE).read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"RWQf6LRC", b"\xff\n", b"x\n" * 9000])
def test_what_is_no_key_is_refused_by_name(tmp_path, content):
    for name, load in (("a.pub", load_key), ("a.key", load_secret_key)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(KeyFileError):
            load(tmp_path / name)


def test_without_the_package_a_required_key_is_an_error(signed, keys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("cryptography")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(MissingExtraError, match=r"bapq-edge\[sign\]"):
        Session(signed, trusted_key=keys / "mine.pub")
    with Session(signed) as session:
        run(session, X)


def test_the_commands(bapq, signed, tmp_path, monkeypatch):
    key, bank = tmp_path / "k.key", tmp_path / "new.bank"
    bapq("keygen", key, "--no-password")
    out, _ = bapq("sign", signed, "--key", key, "--comment", "by hand")
    assert "by hand" in out
    out, _ = bapq("verify", signed, "--key", tmp_path / "k.pub")
    assert "signed with key" in out and "by hand" in out
    bapq("install", signed, bank, "--key", tmp_path / "k.pub")
    bapq("keygen", tmp_path / "l.key", "--no-password", "--json")
    x = tmp_path / "x.npz"
    np.savez(x, x=X)
    wrong = ("--key", tmp_path / "l.pub")
    for command in (("verify", bank), ("install", signed, bank), ("run", bank, "--input", x)):
        bapq(*command, *wrong, code=BankSignatureError.exit_code)
    bapq("verify", bank, "--key", key, code=KeyFileError.exit_code)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    bapq("keygen", tmp_path / "m.key", code=RequestError.exit_code)
