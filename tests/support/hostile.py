"""A bank to damage, and what every refusal must look like."""

from __future__ import annotations

import hashlib
import json

import pytest

from bapq_edge.bank.manifest import digest_in, seal
from bapq_edge.errors import BankError


def snapshot(directory):
    """Every path below a directory with its bytes (None: not a regular file)."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def sealed(document) -> bytes:
    """A manifest of these values, whose digest is right."""
    data = json.dumps(document).encode() + b"\n"
    return data if digest_in(data) is None else seal(data)


class Victim:
    """A copy of the golden bank that can be damaged with all digests made to fit the damage."""

    def __init__(self, path):
        self.path = path

    def file(self, name):
        return self.path / name

    def edit_manifest(self, edit):
        document = json.loads(self.file("manifest.json").read_bytes())
        edit(document)
        self.file("manifest.json").write_bytes(sealed(document))

    def flip(self, name, position):
        """Flip the lowest bit of a byte and leave every digest as it was."""
        data = bytearray(self.file(name).read_bytes())
        data[position] ^= 1
        self.file(name).write_bytes(data)

    def replace_table(self, plane, kind, data):
        """Replace the table `kind` (chunks or digests) of a plane; the manifest vouches for it."""
        self._replace(lambda document: document["planes"][plane][kind], data)

    def replace_sensitivity(self, data):
        """Replace the sensitivity table; the manifest vouches for it."""
        self._replace(lambda document: document["sensitivity"], data)

    def replace_rows(self, key, data):
        """Replace the table row_order or dropped_bias; the manifest vouches for it."""
        self._replace(lambda document: document[key], data)

    def _replace(self, find_entry, data):
        def vouch(document):
            entry = find_entry(document)
            self.file(entry["file"]).write_bytes(data)
            entry["bytes"] = len(data)
            entry["blake2b"] = hashlib.blake2b(data, digest_size=16).hexdigest()

        self.edit_manifest(vouch)

    def refused(self, action, error: type[BankError], *words):
        """`action(path)` must raise `error`, in one line with `words`, and write nothing."""
        before = snapshot(self.path.parent)
        with pytest.raises(error) as caught:
            action(self.path)
        message = str(caught.value)
        assert type(caught.value) is error
        assert "\n" not in message
        assert 20 < len(message) < 600
        assert [word for word in words if word not in message] == [], message
        assert snapshot(self.path.parent) == before
