"""Give memory back and take it again, while a sentence encoder goes on answering."""

import banks

import bapq_edge

bank = banks.minilm()
from benchmarks.zoo.minilm import encode, minilm_dir  # noqa: E402

feed = encode(["It goes on answering."], minilm_dir())
with bapq_edge.Session(bank, memory_budget="64MiB") as session:
    session.on_switch = print
    for budget in ("64MiB", "16MiB", "12MiB", "2MiB", "64MiB"):
        try:
            session.set_memory_budget(budget)
        except bapq_edge.errors.BudgetTooSmallError as error:
            print(f"{budget}: {error}")  # nothing has changed, and the message says what works
        session.run(None, feed)
        print(f"{budget}: {session.stats().resident_bytes >> 10} KiB of weights in memory")
