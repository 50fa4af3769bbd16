"""Row pruning by region: which chunks a region skips, and what stands in for their rows.

contributions ──► rows in a new order, in smaller chunks ──► cost of every chunk, by skipping it
    ──► in every region the cheapest chunks, as many as keep its answers

Everything is measured on the bank itself, run as the device runs it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bapq_edge.bank.boundary import Precision
from bapq_edge.bank.reader import Bank
from bapq_edge.errors import BoundaryDroppedWarning, RequestError, SignatureDroppedWarning

from ..boundary.rewrite import output_rows, rewrite
from ..boundary.runner import Feed, Runner
from ..build_support.progress import Progress
from .contributions import contributions
from .grouping import chunk_rows_of, group_rows
from .skip_search import (
    Agreement,
    Answers,
    RegionSkips,
    SkipSearch,
    chunk_weights,
    worthwhile_layers,
)

__all__ = ["RowPruning", "Samples", "prune_rows"]


@dataclass(frozen=True)
class Samples:
    """Inputs of the model, one sample each, and the region of each."""

    feeds: Sequence[Feed]
    regions: NDArray[np.intp]
    """Region of each sample, (n,)."""

    def of(self, region: int) -> list[Feed]:
        """The samples of a region."""
        return [self.feeds[i] for i in np.flatnonzero(self.regions == region).tolist()]


@dataclass(frozen=True)
class RowPruning:
    """How a bank is to be rewritten, and the rows that its regions then skip."""

    row_order: Mapping[str, NDArray[np.uint32]]
    chunk_rows: Mapping[str, int]
    """Chunk sizes for `rewrite`, as `row_order` by the layers of which some region skips rows."""
    skipped: NDArray[np.uint8]
    """It is 1 where the chunk is skipped, (regions, chunks of the rewritten bank)."""
    row_values: NDArray[np.float32]
    """Values in place of skipped rows, (regions, stored rows of all layers, as rewritten)."""
    skipped_rows: Mapping[str, NDArray[np.intp]]
    """Number of rows that each region skips, (regions,), by layer."""
    threshold: NDArray[np.float64]
    """Cost per weight up to which chunks are skipped, (regions,); 0 where none is."""
    losses: NDArray[np.float64]
    """Loss of every held-out sample, 1 - agreement, with the rows of its region skipped: (n,)."""


def prune_rows(
    bank: str | os.PathLike[str],
    precision: Precision,
    fitted: Samples,
    held_out: Samples,
    reference: Answers,
    output: str,
    agreement: Agreement,
    *,
    regions: int,
    tolerance: float,
    progress: bool = False,
) -> RowPruning:
    """Find the rows that each region can do without; the bank stays as it is.

    A region skips as many chunks as keep its expected loss of agreement within `tolerance`, by the
    bound of conformal risk control (Angelopoulos et al., 2022): (lost + 1) / (n + 1) for its n
    held-out samples. With fewer than 1 / `tolerance` - 1 of them it skips nothing, which a
    BoundaryWarning says.

    Args:
        bank: the bank.
        precision: precision at which rows will be skipped.
        fitted: what means and costs are taken from.
        held_out: what the loss is measured on; none of `fitted`.
        reference: the float model's `output` for each held-out sample.
        output: name of the output that is judged.
        agreement: (n,) from 0 to 1, of answers with those of the reference.
        regions: how many there are.
        tolerance: agreement that a region may lose.
        progress: whether to show it on stderr.

    Raises:
        RequestError: samples, reference or tolerance that do not fit.
        BankError, ExecutionError, StorageError: the bank cannot be read, run or written.
    """
    _check(fitted, held_out, reference, regions, tolerance)
    source = Bank.open(bank)
    layers = source.manifest.layers
    stages = Progress(progress)
    with stages.stage("rows", len(fitted.feeds)) as advance:
        found = contributions(source, precision, fitted.feeds, fitted.regions, regions, advance)
    shares = np.bincount(fitted.regions, minlength=regions) / len(fitted.regions)
    sizes, orders, values = {}, {}, []
    for layer in layers:
        order = output_rows(source, layer)
        if layer.name not in found:
            values.append(np.zeros((regions, layer.stored_rows), np.float32))
            continue
        size = sizes[layer.name] = chunk_rows_of(layer.stored_rows, layer.chunk_rows)
        order = order[group_rows(found[layer.name].cost[:, order], shares, size)]
        orders[layer.name] = order
        values.append(found[layer.name].mean[:, order])
    with tempfile.TemporaryDirectory(prefix="bapq-rows-") as folder:
        path = Path(folder) / "trial.bank"
        with warnings.catch_warnings():
            for dropped in (BoundaryDroppedWarning, SignatureDroppedWarning):
                warnings.simplefilter("ignore", dropped)  # it is only tried
            trial = Bank.open(rewrite(bank, path, row_order=orders, chunk_rows=sizes))
        candidates = [layer for layer in trial.manifest.layers if layer.name in found]
        with (
            contextlib.closing(Runner(trial)) as runner,
            stages.stage("skip", 3 * regions) as advance,
        ):
            search = SkipSearch(runner, trial, precision, output, agreement, tolerance, candidates)
            for region in range(regions):
                rows = np.concatenate([each[region] for each in values])
                mine = [reference[i] for i in np.flatnonzero(held_out.regions == region).tolist()]
                search.add(rows, fitted.of(region), held_out.of(region), mine)
                advance()
            skips = [search.skips(region, candidates, advance) for region in range(regions)]
            pays = worthwhile_layers(candidates, skips, shares)
            skips = [search.skips(region, pays, advance) for region in range(regions)]
    losses = np.empty(len(held_out.feeds))
    for region, each in enumerate(skips):
        losses[held_out.regions == region] = 1 - each.agreement
    return _result(source, trial, orders, sizes, values, skips, losses)


def _check(
    fitted: Samples, held_out: Samples, reference: Answers, regions: int, tolerance: float
) -> None:
    for name, samples in (("fitted", fitted), ("held-out", held_out)):
        if not len(samples.feeds) == len(samples.regions) > 0:
            raise RequestError(
                f"there are {len(samples.feeds)} {name} samples and {len(samples.regions)} regions "
                "of them: give one or more, with one region each"
            )
        if not 0 <= samples.regions.min() <= samples.regions.max() < regions:
            raise RequestError(
                f"{name} samples have regions {samples.regions.min()} to {samples.regions.max()}, "
                f"of {regions}: number them from 0"
            )
    if len(reference) != len(held_out.feeds):
        raise RequestError(
            f"there are {len(reference)} reference answers for {len(held_out.feeds)} held-out "
            "samples: give one each"
        )
    if not 0 < tolerance < 1:
        raise RequestError(f"the tolerance is {tolerance}: choose one between 0 and 1")


def _result(
    source: Bank,
    trial: Bank,
    orders: Mapping[str, NDArray[np.uint32]],
    sizes: Mapping[str, int],
    values: Sequence[NDArray[np.float32]],
    skips: Sequence[RegionSkips],
    losses: NDArray[np.float64],
) -> RowPruning:
    """Put the pruning together; a layer of which no region skips a row stays as it is."""
    found = np.array([each.chunks for each in skips])
    skipped, row_values, counts = [], [], {}
    for layer, tried, rows in zip(
        source.manifest.layers, trial.manifest.layers, values, strict=True
    ):
        chunks = found[:, tried.chunk_range]
        if chunks.any():
            counts[layer.name] = chunks @ (chunk_weights(tried) // tried.columns)
            row_values.append(rows)
        else:
            chunks = np.zeros((len(found), layer.chunk_count), np.bool_)
            row_values.append(np.zeros_like(rows))
        skipped.append(chunks)
    return RowPruning(
        {name: orders[name] for name in counts},
        {name: sizes[name] for name in counts},
        np.concatenate(skipped, axis=1).astype(np.uint8),
        np.concatenate(row_values, axis=1),
        counts,
        np.array([each.threshold for each in skips]),
        losses,
    )
