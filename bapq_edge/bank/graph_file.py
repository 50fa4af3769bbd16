"""What a graph file of a bank may hold, told from its bytes before ONNX Runtime sees them.

A bank is untrusted input, and an ONNX model can name other files, whose bytes ONNX Runtime then
takes for weights, and bring functions and operators of any domain. So the file is walked as the
protobuf that it is, by field numbers of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto, and
what is not on the list is refused. Nothing is copied, and bytes of tensors are stepped over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from ..errors import BankFormatError
from .strict_json import shown

if TYPE_CHECKING:
    from mmap import mmap

__all__ = ["DOMAINS", "check_graph", "external_files"]

DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "bapq")
"""Domains of operators that a graph may hold: ONNX's, ONNX Runtime's, and our own."""

_REPAIR = "do not use this bank, or build it again"

_MOST_NESTING = 90
"""Messages inside each other; protobuf itself ends at 100."""

_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5
_MOST_TAG = (1 << 32) - 1


class _Message(NamedTuple):
    """What may stand in a message of one kind."""

    name: str
    plain: frozenset[int]
    """Fields that say nothing of other files and domains: any value will do."""
    nested: Mapping[int, str]
    """Fields that hold messages, by the name of their kind."""
    refused: Mapping[int, str] = {}
    """Fields that no bank has, and what they would be."""
    domain: int | None = None
    """The field that names a domain of operators."""
    location: int | None = None
    """The field that says where a tensor's bytes are; other than 0 it is outside."""


_MESSAGES = {
    message.name: message
    for message in (
        _Message(
            "model",
            frozenset({1, 2, 3, 4, 5, 6, 14}),
            {7: "graph", 8: "opset"},
            {20: "training information", 25: "a function", 26: "a device configuration"},
        ),
        _Message("opset", frozenset({2}), {}, domain=1),
        _Message(
            "graph",
            frozenset({2, 10, 11, 12, 13, 14, 16}),
            {1: "node", 5: "tensor", 15: "sparse tensor"},
        ),
        _Message(
            "node",
            frozenset({1, 2, 3, 4, 6, 9}),
            {5: "attribute"},
            {8: "an overload of a function", 10: "a device configuration"},
            domain=7,
        ),
        _Message(
            "attribute",
            frozenset({1, 2, 3, 4, 7, 8, 9, 13, 14, 15, 20}),
            {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"}
            | {22: "sparse tensor", 23: "sparse tensor"},
            {21: "an attribute of a function"},
        ),
        _Message(
            "tensor",
            frozenset({1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 16}),
            {},
            {3: "a segment", 13: "external data"},
            location=14,
        ),
        _Message("sparse tensor", frozenset({3}), {1: "tensor", 2: "tensor"}),
    )
}


def check_graph(data: bytes, where: str) -> None:
    """Raise BankFormatError unless the graph is whole in itself; `where` begins the message.

    Refused are external data, operators of domains other than `DOMAINS`, functions, training
    information and whatever else the list above lacks. That the graph makes sense is not looked at:
    ONNX Runtime sees to that.
    """
    try:
        _check(memoryview(data), _MESSAGES["model"], where, 0)
    except _Malformed as error:
        raise BankFormatError(f"{where} is no ONNX model: {error}: {_REPAIR}") from None


def external_files(data: bytes | mmap) -> set[str]:
    """The files that a model keeps tensors in, by their paths relative to it.

    For a model that ONNX Runtime has opened: raises ValueError for bytes that are none.
    """
    return set(_locations(memoryview(data), _MESSAGES["model"]))


def _locations(data: memoryview, kind: _Message) -> Iterator[str]:
    for number, value in _fields(data):
        if isinstance(value, int):
            continue
        if number in kind.nested:
            yield from _locations(value, _MESSAGES[kind.nested[number]])
        elif kind.refused.get(number) == "external data":
            texts = {key: bytes(text) for key, text in _fields(value) if not isinstance(text, int)}
            if texts.get(1) == b"location":
                yield texts[2].decode()


class _Malformed(ValueError):
    """The bytes are no protobuf."""


def _check(data: memoryview, kind: _Message, where: str, depth: int) -> None:
    if depth > _MOST_NESTING:
        raise BankFormatError(f"{where} is nested deeper than {_MOST_NESTING} times: {_REPAIR}")
    for number, value in _fields(data):
        if number in kind.plain:
            continue
        if number in kind.nested:
            if isinstance(value, int):
                raise _Malformed(f"field {number} of a {kind.name} is a number")
            _check(value, _MESSAGES[kind.nested[number]], where, depth + 1)
        elif number == kind.domain:
            domain = "" if isinstance(value, int) else bytes(value).decode("utf-8", "replace")
            if isinstance(value, int) or domain not in DOMAINS:
                allowed = ", ".join(map(shown, DOMAINS))
                raise BankFormatError(
                    f"{where} has operators of domain {shown(domain)}, allowed are {allowed}: "
                    f"{_REPAIR}"
                )
        elif number != kind.location or value != 0:
            what = kind.refused.get(number, f"field {number}")
            what = "external data" if number == kind.location else what
            raise BankFormatError(
                f"{where} has {what} in a {kind.name}, a bank's graph has none: {_REPAIR}"
            )


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Number and value of every field: the bytes of what has a length, else a number."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, form = tag >> 3, tag & 7
        if tag > _MOST_TAG or number == 0:
            raise _Malformed(f"tag {tag} at byte {at}")
        if form == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if form == _BYTES:
            size, at = _varint(data, at)
        elif form in (_FIXED_32, _FIXED_64):
            size = 4 if form == _FIXED_32 else 8
        else:
            raise _Malformed(f"form {form} of field {number} at byte {at}")
        if size > len(data) - at:
            raise _Malformed(f"field {number} has {size} bytes, {len(data) - at} are left")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of up to 64 bits, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _Malformed("it breaks off")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & ((1 << 64) - 1), at
    raise _Malformed(f"a number is longer than 10 bytes at byte {at}")
