"""Find the sentence that means most nearly the same, with a sentence encoder in 24 MiB."""

import sys

import banks
import numpy as np

import bapq_edge

bank = banks.minilm()
from benchmarks.zoo.minilm import encode, minilm_dir  # noqa: E402
from benchmarks.zoo.sentences import load_sentences  # noqa: E402

known = load_sentences()[1][:50]
asked = " ".join(sys.argv[1:]) or "Parse the headers of an email."
feeds = [encode([sentence], minilm_dir()) for sentence in (asked, *known)]
with bapq_edge.Session(bank, memory_budget="24MiB", level=8) as session:
    rows = [session.run(["sentence_embedding"], feed)[0][0] for feed in feeds]  # of unit length
    grown_mib = session.stats().peak_bytes / (1 << 20)
likeness = np.stack(rows[1:]) @ rows[0]
for index in np.argsort(likeness)[::-1][:3]:
    print(f"{likeness[index]:.2f}  {known[index]}")
print(f"the session took {grown_mib:.1f} MiB")
