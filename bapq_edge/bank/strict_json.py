"""JSON to frozen dataclasses and back, refusing everything that the types do not allow.

The type of a field says what it holds, a `Rule` in `Annotated` what its value must satisfy beyond
that. `X | None` means that the key may be absent; null is never allowed. A field's key is its name,
unless its metadata says another under `KEY`.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import BankError, BankFormatError

__all__ = ["KEY", "Place", "Rule", "decode", "encode", "parse_json", "shown"]


KEY = "key"
"""Name under which a field's metadata gives its key in the document, if that is not its name."""


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy beyond its type, and how a message says so."""

    allowed: str
    test: Callable[[Any], Any]
    error: type[BankError] = BankFormatError


@dataclass(frozen=True)
class Place:
    """A place in the document, for messages."""

    where: str
    key: str

    def key_of(self, name: str) -> Place:
        """The place of a member."""
        plain = name if re.fullmatch(r"\w{1,60}", name, re.ASCII) else shown(name)
        return Place(self.where, f"{self.key}.{plain}" if self.key else plain)

    def item(self, index: int) -> Place:
        """The place of a list's item."""
        return Place(self.where, f"{self.key}[{index}]")

    def wrong(
        self, value: Any, allowed: str, error: type[BankError] = BankFormatError
    ) -> BankError:
        """Make the error that the value here is not what is allowed."""
        return error(f"{self.where}: {self.key} is {shown(value)}, must be {allowed}")


def parse_json(data: bytes, where: str, max_bytes: int) -> Any:
    """Parse UTF-8 JSON of at most `max_bytes` that ends with a newline.

    Refuses duplicate keys, NaN, infinities, huge integers and deep nesting with BankFormatError.
    """
    if len(data) > max_bytes:
        raise BankFormatError(
            f"{where} has {len(data)} bytes, allowed are {max_bytes}: not a bank manifest"
        )
    if not data.endswith(b"\n"):
        raise BankFormatError(
            f"{where} breaks off after {len(data)} bytes without a newline: copy the bank again"
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise BankFormatError(f"{where}: key {shown(key)} stands twice in one object")
            result[key] = value
        return result

    def refuse(constant: str) -> None:
        raise BankFormatError(f"{where} holds {constant}, which is not JSON")

    def integer(digits: str) -> int:
        if len(digits) > 20:
            raise BankFormatError(f"{where} holds an integer of {len(digits)} digits, allowed: 20")
        return int(digits)

    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse, parse_int=integer
        )
    except UnicodeDecodeError as error:
        raise BankFormatError(f"{where} is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise BankFormatError(
            f"{where} is not JSON at character {error.pos}: {error.msg}"
        ) from None
    except RecursionError:
        raise BankFormatError(f"{where} is nested too deeply to be a bank manifest") from None


def shown(value: Any) -> str:
    """A value as a message shows it: one short line."""
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str) and len(value) > 60:
        value = value[:60] + "..."
    return json.dumps(value)


@dataclass(frozen=True)
class _Field:
    name: str
    key: str
    hint: Any
    required: bool


@cache
def _fields_of(cls: type) -> tuple[_Field, ...]:
    """Fields with resolved types; `X | None` means that the key may be absent."""
    hints = get_type_hints(cls, include_extras=True)
    result = []
    for item in fields(cls):
        hint = hints[item.name]
        options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        present = [option for option in options if option is not type(None)]
        key = item.metadata.get(KEY, item.name)
        result.append(_Field(item.name, key, present[0], len(present) == len(options)))
    return tuple(result)


def decode(hint: Any, value: Any, place: Place) -> Any:
    """Make a value of the type `hint` of parsed JSON, or raise BankFormatError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        base, rule = arguments
        decoded = decode(base, value, place)
        if not rule.test(decoded):
            raise place.wrong(value, rule.allowed, rule.error)
        return decoded
    if origin is tuple:
        if type(value) is not list:
            raise place.wrong(value, "a list")
        return tuple(decode(arguments[0], v, place.item(i)) for i, v in enumerate(value))
    if origin is Literal:
        # By type too: true == 1 and 4.0 == 4.
        if not any(type(value) is type(option) and value == option for option in arguments):
            raise place.wrong(value, "one of " + ", ".join(map(str, arguments)))
        return value
    if type(value) is not dict and (origin is dict or is_dataclass(hint)):
        raise place.wrong(value, "an object")
    if origin is dict:
        if get_origin(arguments[0]) is Literal:
            keys = {str(key): key for key in get_args(arguments[0])}
            _check_keys(value, keys, (), place)
        else:
            keys = {key: decode(arguments[0], key, place) for key in value}
        return {keys[k]: decode(arguments[1], v, place.key_of(k)) for k, v in value.items()}
    if is_dataclass(hint):
        members = _fields_of(hint)  # type: ignore[arg-type]
        known_keys = [member.key for member in members]
        _check_keys(value, known_keys, [m.key for m in members if m.required], place)
        return hint(  # type: ignore[operator]
            **{
                m.name: decode(m.hint, value[m.key], place.key_of(m.key))
                for m in members
                if m.key in value
            }
        )
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        words = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
        raise place.wrong(value, words[hint])
    return value


def _check_keys(value: dict[str, Any], known: Any, required: Any, place: Place) -> None:
    for key in value:
        if key not in known:
            raise BankFormatError(
                f"{place.where}: unknown key {place.key_of(key).key}, "
                f"allowed are {', '.join(sorted(known))}"
            )
    for key in required:
        if key not in value:
            raise BankFormatError(f"{place.where}: key {place.key_of(key).key} is missing")


def encode(value: Any) -> Any:
    """JSON form of a value; None is left out."""
    if is_dataclass(value):
        members = ((item.metadata.get(KEY, item.name), item.name) for item in fields(value))
        values = ((key, getattr(value, name)) for key, name in members)
        return {key: encode(member) for key, member in values if member is not None}
    if isinstance(value, Mapping):
        return {str(key): encode(member) for key, member in value.items()}
    if isinstance(value, tuple):
        return [encode(member) for member in value]
    return value
