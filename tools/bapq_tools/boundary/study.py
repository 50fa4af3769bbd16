"""Runs a bank on a set of samples: its answers at every precision, and how they agree.

Everything is run once and kept, so that several fits may share it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray

from bapq_edge.adaptive.boundary_model import pooled
from bapq_edge.bank.boundary import Precision
from bapq_edge.bank.files import digest_of
from bapq_edge.bank.reader import Bank
from bapq_edge.engine.graph import RUN_INPUT
from bapq_edge.errors import (
    BoundaryError,
    BoundaryWarning,
    NoTapError,
    RequestError,
)
from bapq_edge.units import format_size

from ..build_support.progress import Progress
from ..calibration.float_model import name_of, open_float_model, run_graph
from ..calibration.samples import (
    CalibrationSource,
    check_calibration_source,
    load_calibration,
)
from ..onnx_graph.importers.onnx_file import check_model_source
from .agreement import Judge, find_judge, parse_agreement
from .features import pool_of
from .runner import Feed, Runner, map_feeds
from .taps import BankGraph, Cut

__all__ = ["Study", "Tap"]

SampleArrays = list[NDArray[Any]]
"""One array per sample."""

_MOST_TAP_BYTES = 2 << 30
"""Most bytes of a tap's values for all samples: the body reads them once per precision."""


@dataclass(frozen=True)
class Tap:
    """The values of a tensor for all samples."""

    name: str
    values: SampleArrays
    """One array per sample, (1, ...) float32."""
    pool: tuple[int, ...]
    """Lengths that the axes after the first are averaged down to."""

    def flat(self, rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """The pooled values of some samples, (rows, values)."""
        return np.concatenate([pooled(self.values[row], self.pool) for row in rows])


class Study:
    """Context manager of a bank, samples and a reference to agree with."""

    def __init__(
        self,
        bank: str | os.PathLike[str] | Bank,
        calibration: CalibrationSource,
        model: str | os.PathLike[str] | onnx.ModelProto | None = None,
        *,
        agreement: str | None = None,
        judge: str | None = None,
        groups: ArrayLike | None = None,
        progress: bool = True,
    ) -> None:
        """Run the reference.

        Args:
            bank: what is studied.
            calibration: samples, as for a build.
            model: the reference; None is level 32 of the bank.
            agreement: argmax, cosine or tolerance:X; None: by the rule of `find_judge`.
            judge: output that is judged; None is the only one of floats.
            groups: (samples,) integers; samples of one group never stand on both sides of a split.
            progress: show it on stderr.

        Raises:
            BankError, CalibrationError, ModelError, InputFileError, RequestError, BoundaryError.
        """
        # Before anything is run.
        parse_agreement(agreement)
        check_calibration_source(calibration)
        if model is not None:
            check_model_source(model)
        self.bank = bank if isinstance(bank, Bank) else Bank.open(bank)
        self.graph = BankGraph(self.bank)
        self.inputs = [item for item in self.graph.model.graph.input if item.name != RUN_INPUT]
        self._outputs = [item.name for item in self.graph.model.graph.output]
        data = load_calibration(calibration, self.inputs)
        built_with = self.bank.manifest.calibration
        if built_with is not None and built_with.blake2b == data.blake2b:
            warnings.warn(
                f"{self.bank.path} was built with these very samples, so its low levels may agree "
                "with them more than with others: give samples that it has not seen",
                BoundaryWarning,
                stacklevel=3,
            )
        self.samples = data.samples
        self.groups = _checked_groups(groups, data.samples)
        self.feeds: list[Feed] = [data.feed(sample) for sample in range(data.samples)]
        self._stages = Progress(progress)
        self._answers: dict[Precision, SampleArrays] = {}
        self._losses: dict[Precision, NDArray[np.float64]] = {}
        self._taps: dict[tuple[str, Precision], Tap] = {}
        self._split_losses: dict[tuple[str, Precision, Precision], NDArray[np.float64]] = {}
        self._halves: dict[str, tuple[bytes, bytes]] = {}
        self.runner = Runner(self.bank)
        try:
            references = self._refer(model)
            self.judge: Judge = find_judge(references, agreement, judge)
            self.wanted: SampleArrays = references[self.judge.output]
            self._check_outputs()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the weights' memory back."""
        self.runner.close()

    def __enter__(self) -> Study:
        """The study itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()

    @property
    def classes(self) -> NDArray[np.intp]:
        """The reference's class, (samples,), where that is what is judged."""
        return self.judge.classes(self.wanted)

    def answers(self, precision: Precision) -> SampleArrays:
        """The judged output at a precision."""
        if precision not in self._answers:
            self._answers[precision] = self._run(
                self.bank.graph_bytes(),
                precision,
                self.judge.output,
                self.feeds,
                f"answers at {precision}",
            )
        return self._answers[precision]

    def losses(self, precision: Precision) -> NDArray[np.float64]:
        """The loss of each sample, 1 - agreement with the reference: (samples,)."""
        if precision not in self._losses:
            self._losses[precision] = 1 - self.judge.agreement(self.answers(precision), self.wanted)
        return self._losses[precision]

    def input_tap(self, name: str) -> Tap:
        """Take an input as the tap; NoTapError where no features can be taken from it."""
        return _tap(name, [feed[name] for feed in self.feeds])

    def answer_tap(self, precision: Precision) -> Tap:
        """Take the answer at a precision as the tap; NoTapError where it gives no features."""
        return _tap(self.judge.output, self.answers(precision))

    def halves(self, cut: Cut) -> tuple[bytes, bytes]:
        """Split the graph into head and body, as ONNX models."""
        if cut.tap not in self._halves:
            self._halves[cut.tap] = self.graph.split(cut)
        return self._halves[cut.tap]

    def tap(self, cut: Cut, base: Precision) -> Tap:
        """Run the head at a precision; NoTapError where it does not give (1, ...) float32."""
        key = cut.tap, base
        if key not in self._taps:
            head, _ = self.halves(cut)
            text = f"tap {cut.tap} at {base}"
            first = self.runner.run(head, base, [cut.tap], self.feeds[:1], _first, lambda: None)
            _tap(cut.tap, first)
            size = first[0].nbytes * self.samples
            if size > _MOST_TAP_BYTES:
                raise NoTapError(
                    f"tap {cut.tap!r} of {self.samples} samples takes {format_size(size)}, allowed "
                    f"are {format_size(_MOST_TAP_BYTES)}: name another one, or give fewer samples"
                )
            self._taps[key] = _tap(cut.tap, self._run(head, base, cut.tap, self.feeds, text))
        return self._taps[key]

    def split_losses(self, cut: Cut, base: Precision, precision: Precision) -> NDArray[np.float64]:
        """The losses with the head at `base` and the body at `precision`, (samples,)."""
        key = cut.tap, base, precision
        if key not in self._split_losses:
            _, body = self.halves(cut)
            taps = self.tap(cut, base).values
            feeds = [{**feed, cut.tap: value} for feed, value in zip(self.feeds, taps, strict=True)]
            found = self._run(body, precision, self.judge.output, feeds, f"body at {precision}")
            self._split_losses[key] = 1 - self.judge.agreement(found, self.wanted)
        return self._split_losses[key]

    def _run(
        self, graph: bytes, precision: Precision, output: str, feeds: Sequence[Feed], text: str
    ) -> SampleArrays:
        with self._stages.stage(text, len(feeds)) as advance:
            return self.runner.run(graph, precision, [output], feeds, _first, advance)

    def _refer(
        self, model: str | os.PathLike[str] | onnx.ModelProto | None
    ) -> dict[str, SampleArrays]:
        names, feeds = self._outputs, self.feeds
        with self._stages.stage("reference", len(feeds)) as advance:
            if model is not None:
                session, where = self._open_reference(model), name_of(model)
                rows = map_feeds(lambda f: run_graph(session, names, f, where), feeds, advance)
            elif 32 in self.bank.levels:
                graph = self.bank.graph_bytes()
                rows = self.runner.run(
                    graph, Precision(32), names, feeds, lambda found: found, advance
                )
            else:
                held = ", ".join(map(str, self.bank.levels))
                raise RequestError(
                    f"{self.bank.path} holds the levels {held} and not 32, so it cannot tell what "
                    "the float model answers: give the model with --model MODEL.onnx"
                )
        return {name: [row[i] for row in rows] for i, name in enumerate(names)}

    def _open_reference(self, model: str | os.PathLike[str] | onnx.ModelProto) -> Any:
        session = open_float_model(model, self.feeds[0], self._outputs)
        if not isinstance(model, onnx.ModelProto):
            self._check_is_source(Path(model))
        return session

    def _check_is_source(self, path: Path) -> None:
        if digest_of(path.read_bytes()) != self.bank.manifest.model.blake2b:
            warnings.warn(
                f"{path} is not the file that {self.bank.path} was built from; it is taken as the "
                "reference all the same",
                BoundaryWarning,
                stacklevel=6,
            )

    def _check_outputs(self) -> None:
        graph, precision = self.bank.graph_bytes(), Precision(self.bank.levels[-1])
        (found,) = self.runner.run(
            graph, precision, [self.judge.output], self.feeds[:1], _first, lambda: None
        )
        if found.shape != self.wanted[0].shape:
            raise BoundaryError(
                f"output {self.judge.output!r} has shape {found.shape} in the bank and "
                f"{self.wanted[0].shape} in the reference: give the model that the bank was built "
                "from"
            )


def _first(outputs: SampleArrays) -> NDArray[Any]:
    return outputs[0]


def _tap(name: str, values: SampleArrays) -> Tap:
    for value in values:
        if value.dtype != np.float32 or value.ndim < 2 or len(value) != 1:
            raise NoTapError(
                f"tap {name!r} is {value.dtype} of shape {value.shape} for one sample, features "
                "need float32 of shape (1, ...): name another one"
            )
        if not np.isfinite(value).all():
            raise NoTapError(f"tap {name!r} holds NaN or infinity for a sample: name another one")
    return Tap(name, values, pool_of([value.shape for value in values]))


def _checked_groups(groups: ArrayLike | None, samples: int) -> NDArray[np.intp]:
    if groups is None:
        return np.arange(samples)
    found = np.asarray(groups)
    if found.shape != (samples,) or found.dtype.kind not in "iu":
        raise RequestError(
            f"groups are {found.dtype} of shape {found.shape}, expected integers ({samples},): "
            "give one per sample"
        )
    return found.astype(np.intp)
