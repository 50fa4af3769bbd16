"""A policy of one's own: two bits first, and eight where the best two classes lie close."""

import banks
import numpy as np

import bapq_edge
from bapq_edge.policy import Choice, Policy, PolicyContext, Precision

FEW, MANY = Precision(level=2), Precision(level=8)


class AskTwice(Policy):
    """Answers again where the margin of the answer is small."""

    reads = ("logits",)

    def choose(self, context: PolicyContext) -> Choice | None:
        """What to run next; None lets the answer stand."""
        if context.stage == "start":
            return Choice(FEW)
        if context.stage != "answer" or context.precision == MANY:
            return None
        second, first = np.sort(context.values["logits"][0])[-2:]
        return Choice(MANY) if first - second < 2.0 else None


bank, images, labels = banks.digits()
with bapq_edge.Session(bank, policy=AskTwice()) as session:
    answers = [session.run(None, {"image": image[None]})[0].argmax() for image in images]
    stats = session.stats()
print(
    f"{(np.array(answers) == labels).sum()} of {len(labels)} right, {stats.escalated} asked twice"
)
print(f"{stats.mean_bits_per_weight:.2f} bits per weight on average")
