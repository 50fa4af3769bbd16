"""On the board: what a power cut has left of a bank, then updates of it, one after the other.

Usage: update.py BANK FIRST SECOND INSTALLS; FIRST and SECOND take turns.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bapq_edge.bank.install import install
from bapq_edge.bank.reader import Bank
from bapq_edge.bank.verify import verify
from bapq_edge.errors import BankError


def main(bank: str, first: str, second: str, installs: str) -> None:
    """Tell what is there, then what is being installed and what has been."""
    names = (first, second)
    found, intact = None, True
    if list(Path(bank).parent.glob(f"{Path(bank).name}*")):
        try:
            manifest = Bank.open(bank).manifest.to_json()
            (found,) = (name for name in names if Bank.open(name).manifest.to_json() == manifest)
            intact = verify(bank).ok
        except (BankError, ValueError) as error:
            intact = False
            print(repr(error), flush=True)
    print(json.dumps({"found": found, "intact": intact}), flush=True)
    turn = names.index(found) + 1 if found else 0
    for number in range(turn, turn + int(installs)):
        new = names[number % 2]
        print(json.dumps({"installing": new}), flush=True)
        report = install(new, bank)
        beside = [p.name for p in Path(bank).parent.glob(f"{Path(bank).name}?*")]
        record = {"installed": new, "copied": report.bytes_copied, "beside": beside}
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
