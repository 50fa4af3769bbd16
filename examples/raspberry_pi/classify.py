"""Run a bank on inputs from a file, one by one, and change its precision between them."""

from __future__ import annotations

import argparse
import sys

import numpy as np

import bapq_edge


def main() -> int:
    """Answer all inputs at the planner's choice, and again at a level of the caller's."""
    parser = argparse.ArgumentParser(description="run a bank on an .npz, at two precisions")
    parser.add_argument("bank")
    parser.add_argument("input", help=".npz, one array per model input, samples on the first axis")
    parser.add_argument("--budget", default="64MiB", help="what the process may grow by")
    parser.add_argument("--then-level", default="4", help="the second precision (default: 4)")
    options = parser.parse_args()
    with np.load(options.input) as arrays:
        samples = {name: arrays[name] for name in arrays.files}
    count = len(next(iter(samples.values())))
    try:
        with bapq_edge.Session(
            options.bank,
            memory_budget=options.budget,
            on_switch=lambda event: print("switched:", event),
        ) as session:
            for level in (None, options.then_level):
                if level is not None:
                    session.set_level(level)  # live: the next run has it
                answers = []
                for i in range(count):
                    one = {name: array[i : i + 1] for name, array in samples.items()}
                    scores = session.run(None, one)[0]
                    answers.append(int(np.argmax(scores)))
                stats = session.stats()
                print(
                    f"{stats.bits_per_weight:.2f} bits per weight, "
                    f"{stats.resident_bytes / 2**20:.2f} MiB of weights in memory, "
                    f"process grew by {stats.peak_bytes / 2**20:.1f} MiB"
                )
                print("answers:", *answers)
    except bapq_edge.BapqError as error:
        print(f"classify: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
