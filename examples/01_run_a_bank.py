"""Run a bank at every level: the same answers out of ever fewer bytes."""

import banks

import bapq_edge

bank, images, labels = banks.digits()
with bapq_edge.Session(bank) as session:
    for level in (8, 4, 2, 1):
        session.set_level(level)  # from the next run on; nothing is loaded again
        (logits,) = session.run(None, {"image": images})
        right = (logits.argmax(axis=1) == labels).sum()
        print(f"level {level}: {right} of {len(labels)} right, ", end="")
        print(f"{session.stats().resident_bytes / 1024:.0f} KiB of weights in memory")
