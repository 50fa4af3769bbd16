"""The commands `bapq keygen` and `bapq sign`."""

from __future__ import annotations

import argparse
import getpass
import json
import sys
from pathlib import Path
from typing import Any

from bapq_edge.commands.options import add_bank, add_json
from bapq_edge.errors import InputFileError, KeyFileError, RequestError
from bapq_edge.input_files import input_file_errors

__all__ = ["add_keygen_command", "add_sign_command"]


def add_keygen_command(commands: Any) -> None:
    """Add `keygen` to the subparsers of the `bapq` command."""
    keygen = commands.add_parser("keygen", help="make a key to sign banks with")
    keygen.add_argument(
        "key", type=Path, metavar="NAME.key", help="secret key to write; the public one is NAME.pub"
    )
    protection = keygen.add_mutually_exclusive_group()
    protection.add_argument(
        "--no-password", action="store_true", help="let the file alone be enough to sign"
    )
    _add_password_file(protection)
    add_json(keygen, "the key's id and files")
    keygen.set_defaults(command=_keygen)


def add_sign_command(commands: Any) -> None:
    """Add `sign` to the subparsers of the `bapq` command."""
    sign = commands.add_parser("sign", help="sign a bank, so that devices can tell who made it")
    add_bank(sign)
    sign.add_argument(
        "--key",
        type=Path,
        required=True,
        metavar="NAME.key",
        help="secret key, of 'bapq keygen' or of minisign",
    )
    _add_password_file(sign)
    sign.add_argument(
        "--comment",
        metavar="TEXT",
        help="a line that is signed too (default: the time, the model and the bank's digest)",
    )
    add_json(sign, "the key's id and the comment")
    sign.set_defaults(command=_sign)


def _add_password_file(group: Any) -> None:
    group.add_argument(
        "--password-file",
        type=Path,
        metavar="FILE",
        help="file whose first line is the password (default: asked for on the terminal)",
    )


def _keygen(arguments: argparse.Namespace) -> None:
    from ..signing import make_key

    password = None
    if not arguments.no_password:
        password = _password(arguments.password_file, "or give --no-password", twice=True)
    key = make_key(arguments.key, password)
    public = arguments.key.with_suffix(".pub")
    if arguments.json:
        print(json.dumps({"key": key.name, "secret": str(arguments.key), "public": str(public)}))
        return
    print(f"key {key.name}: sign with {arguments.key}, which nobody else may have;")
    print(f"devices need {public}")


def _sign(arguments: argparse.Namespace) -> None:
    from ..signing import is_under_password, load_secret_key, sign

    password = None
    if is_under_password(arguments.key):
        password = _password(arguments.password_file, "or use a key without one")
    signature = sign(arguments.bank, load_secret_key(arguments.key, password), arguments.comment)
    if arguments.json:
        print(json.dumps({"key": signature.key.name, "comment": signature.comment}))
    else:
        print(f"{arguments.bank}: {signature}")


def _password(file: Path | None, other: str, *, twice: bool = False) -> str:
    if file is not None:
        try:
            with input_file_errors(file):
                password = (file.read_text(encoding="utf-8").splitlines() or [""])[0]
        except UnicodeDecodeError:
            raise InputFileError(
                f"{file} is no text in UTF-8: write the password into its first line"
            ) from None
    elif not sys.stdin.isatty():
        raise RequestError(f"there is no terminal to ask for a password: --password-file, {other}")
    else:
        password = getpass.getpass("password: ")
        if twice and getpass.getpass("the same again: ") != password:
            raise KeyFileError("the two passwords differ: try again")
    if twice and not password:
        raise KeyFileError(f"the password is empty: choose one, {other}")
    return password
