"""The `bapq` command. The commands are in `commands/`; errors leave through `main` alone."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import entry_points

from . import __version__
from .commands.bench import add_bench
from .commands.doctor import add_doctor
from .commands.exchange import add_exchange
from .commands.inspect import add_inspect
from .commands.install import add_install
from .commands.parser import Parser
from .commands.profile import add_profile
from .commands.run import add_run
from .commands.verify import add_verify
from .commands.warning_lines import warning_lines
from .engine.library import library_path
from .errors import BapqError, StorageError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code, that of the error's class when it failed."""
    code = 0
    try:
        try:
            _run(sys.argv[1:] if arguments is None else arguments)
        except SystemExit as end:  # argparse has said all there is to say
            code = int(end.code or 0)
        except BapqError as error:
            _tell(str(error))
            code = error.exit_code
        if sys.stdout is not None:  # None: the shell closed it
            sys.stdout.flush()  # here, not when Python ends, is where a full disk can be told
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        _discard_output()
    except OSError as error:
        _tell(f"{error.filename or 'the output cannot be written'}: {error.strerror or error}")
        _discard_output()
        code = StorageError.exit_code
    except KeyboardInterrupt:
        print("bapq: interrupted", file=sys.stderr)
        code = 130
    return code


def _tell(message: str) -> None:
    """Print one line for the exception that is being handled."""
    if os.environ.get("BAPQ_DEBUG") == "1":
        traceback.print_exc()
    print(f"bapq: {message}", file=sys.stderr)


def _run(arguments: Sequence[str]) -> None:
    library_path()  # a 32-bit Python or a broken install says so before anything else
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    parser = _parser()
    _complete(parser)
    parsed = parser.parse_args(arguments)
    if parsed.command is None:
        parser.print_help()
        return
    with warning_lines():
        parsed.command(parsed)


def _discard_output() -> None:
    """Let Python, when it ends, write what is left of the output to nowhere."""
    with contextlib.suppress(OSError):  # it has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> Parser:
    parser = Parser(
        prog="bapq",
        description="Models in nested precisions, for boards they do not fit.",
        epilog="Completion in bash and zsh: pip install 'bapq-edge[completion]', then "
        'eval "$(register-python-argcomplete bapq)" in the shell\'s startup file.',
    )
    parser.add_argument("--version", action="version", version=f"bapq {__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    # The host tools bring `build`; on a device they may be absent.
    for entry in sorted(entry_points(group="bapq.commands"), key=lambda entry: entry.name):
        entry.load()(commands)
    for add_command in (
        add_run,
        add_bench,
        add_profile,
        add_doctor,
        add_inspect,
        add_verify,
        add_install,
        add_exchange,
    ):
        add_command(commands)
    return parser


def _complete(parser: Parser) -> None:
    """Answer a shell that asks how a command line may go on, where argcomplete is installed."""
    if "_ARGCOMPLETE" in os.environ:
        with contextlib.suppress(ModuleNotFoundError):
            import argcomplete

            argcomplete.autocomplete(parser)  # ends the process
