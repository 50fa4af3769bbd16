"""Fuzzes reader or session with damaged banks: `python tests/fuzz/fuzz.py reader --runs 1000`.

`flips` turns over every bit of every file of a small bank, one by one. With atheris installed
(`make fuzz`), `--coverage` lets it steer: it begins with what tests/fuzz/corpus holds, and keeps
what it finds, crashes too, in .cache/fuzz. A crash tells the bytes that led to it. A hang ends
after a minute with the stack of every thread.
"""

from __future__ import annotations

import argparse
import faulthandler
import inspect
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

MOST_BYTES = 96
HANG_S = 60
CORPUS = Path(__file__).with_name("corpus")
FOUND = Path(__file__).resolve().parents[2] / ".cache/fuzz"


def main() -> None:
    """Parse the command line and fuzz."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=["reader", "session", "flips"])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--coverage", action="store_true", help="let atheris steer")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bapq-fuzz-") as work:
        folder = Path(work)
        if arguments.target == "flips":
            flip_all(folder)
        elif arguments.coverage:
            steer(arguments, folder)
        else:
            mutate(arguments, folder)


def mutate(arguments: argparse.Namespace, folder: Path) -> None:
    """Mutants out of a seeded generator."""
    from support import mutants

    target = (mutants.Reader if arguments.target == "reader" else mutants.Runner)(folder)
    rng = random.Random(arguments.seed)
    end_s = time.monotonic() + arguments.seconds
    done = refused = 0
    while done < arguments.runs and time.monotonic() < end_s:
        data = rng.randbytes(rng.randint(8, MOST_BYTES))
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        try:
            refused += target.check(data)
        except BaseException:
            print(f"mutant {done} of seed {arguments.seed}: {data.hex()}", file=sys.stderr)
            raise
        done += 1
    faulthandler.cancel_dump_traceback_later()
    print(f"{arguments.target}: {done} mutants, {refused} refused, {done - refused} as good as new")


def flip_all(folder: Path) -> None:
    """Every single bit of every file; each is noticed by the reader, and changes no answer."""
    from support import mutants

    runner = mutants.Runner(folder / "session", tiny=True)
    reader = mutants.Reader(folder / "reader", mutants.tiny_bank(folder / "tiny.bank"))
    for target, what in ((reader, "reader"), (runner, "session")):
        flipped = refused = 0
        for name, size in target.mutants.sizes().items():
            for bit in range(8 * size):
                flipped += 1
                refused += target.check_flip(name, bit)
        print(f"{what}: {flipped} bits, {refused} refused, no other answer", flush=True)


def steer(arguments: argparse.Namespace, folder: Path) -> None:
    """Mutants by the coverage of the reader's own code."""
    import atheris

    from support import mutants

    # One by one: its hook for imports does not see an editable install.
    for name, module in list(sys.modules.items()):
        if name.startswith("bapq_edge.") and module is not None:
            for value in vars(module).values():
                for member in vars(value).values() if isinstance(value, type) else (value,):
                    if inspect.isfunction(member) and member.__module__ == name:
                        atheris.instrument_func(member)
    target = (mutants.Reader if arguments.target == "reader" else mutants.Runner)(folder)
    found = FOUND / arguments.target
    found.mkdir(parents=True, exist_ok=True)
    command = [
        sys.argv[0],
        str(found),  # the first is written to, the second only read
        str(CORPUS / arguments.target),
        f"-artifact_prefix={found}-",
        f"-max_len={MOST_BYTES}",
        f"-timeout={HANG_S}",
        "-len_control=0",
    ]
    command += [f"-runs={arguments.runs}", f"-seed={arguments.seed}"]
    if arguments.seconds != float("inf"):
        command.append(f"-max_total_time={int(arguments.seconds)}")
    atheris.Setup(command, lambda data: int(target.check(data)) * 0)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
