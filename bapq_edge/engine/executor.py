"""The executor: one pass over a graph, on the plan that is published when it begins.

begin run ──► ticket ──► graph ──► operators of ours find their run by it ──► end run ──► report

The session and the host tool run banks through this, and nothing else knows the ticket.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .graph import RUN_INPUT, Graph
from .store import Run, RunReport, Store

__all__ = ["execute"]


def execute(
    store: Store,
    graph: Graph,
    feed: Mapping[str, Any],
    names: Sequence[str] | None = None,
    run_options: Any = None,
    *,
    run: Run | None = None,
) -> tuple[dict[str, Any], RunReport | None]:
    """Run a graph once on the weights of a store; its outputs by name, and how the run went.

    All outputs are made, or those of `names`; where no operator of ours is in the graph there is no
    run to tell of, and the report is None. The feed may hold more than the graph takes. `run` is an
    open one, which ends here; None: one that begins now.

    Raises RunInputError for a feed that does not fit, ExecutionError where the graph fails,
    BankIntegrityError, BankTruncatedError or StorageError where weights cannot be read.
    """
    if not graph.takes_ticket:
        return graph.call(names, feed, run_options), None
    run = store.begin_run() if run is None else run
    try:
        outputs = graph.call(names, {**feed, RUN_INPUT: run.ticket}, run_options)
    finally:
        report = store.end_run(run)  # an operator of ours that failed raises here
    return outputs, report
