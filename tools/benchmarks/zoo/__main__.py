"""Command line: PYTHONPATH=tools python -m benchmarks.zoo NAME OUT.onnx, or --list."""

from __future__ import annotations

import argparse
import os
import sys

from rich.console import Console

from bapq_edge.errors import BapqError

from . import MODELS, make_model


def main() -> int:
    """Write one model; 0, or an error's exit code after one line on stderr."""
    parser = argparse.ArgumentParser(prog="benchmarks.zoo", description="Write a model as ONNX.")
    parser.add_argument("name", nargs="?", choices=MODELS, metavar="NAME", help="one of --list")
    parser.add_argument("out", nargs="?", metavar="OUT.onnx")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(MODELS))
        return 0
    if arguments.out is None:
        parser.error("NAME and OUT.onnx are needed; --list prints the names")
    try:
        with Console(stderr=True).status(f"building {arguments.name}"):
            make_model(arguments.name, arguments.out)
    except (BapqError, OSError) as error:
        print(f"benchmarks.zoo: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    print(f"{arguments.out}: {os.path.getsize(arguments.out) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
