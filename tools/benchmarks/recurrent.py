"""What LSTM and GRU nodes cost as layers of a bank, beside ONNX Runtime's nodes.

    PYTHONPATH=tools python -m benchmarks.recurrent [-r ROUNDS] [--voice] [--format table|md]

Two layers with random weights, one thread; medians of rounds that take all in turns, in time of the
process: the turns of other programs do not count. Where a loop over steps does not pay the build
leaves the node, so its row says how many of the weights are in planes. --voice takes the trained
detector of voices instead (`make .cache/silero/.ready`), frame by frame with its state kept, and
counts the frames at which it says otherwise than in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from bapq_edge import Session
from bapq_edge.bank.reader import Bank
from bapq_edge.engine.library import kernels_name
from bapq_edge.errors import UncalibratedWarning
from bapq_tools import build_bank

from .run_overhead import cpu_name
from .tables import add_format, format_mib, print_table
from .zoo.voice import conversation, detector_path, listen, open_detector

CASES = [
    ("LSTM", hidden, steps) for hidden in (64, 128, 256, 512) for steps in (1, 100)
] + [("GRU", 128, 100), ("GRU", 256, 100)]  # fmt: skip
LEVELS = (32, 8, 4)
GATES = {"LSTM": 4, "GRU": 3}
LAYERS = 2

Run = Callable[[], Any]
Feed = Mapping[str, np.ndarray]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.recurrent", description=__doc__)
    parser.add_argument("-r", "--rounds", type=int, default=101, metavar="ROUNDS")
    parser.add_argument("--voice", action="store_true", help="the trained detector of voices")
    add_format(parser)
    arguments = parser.parse_args()
    setting = f"{cpu_name()}, kernels {kernels_name()}, onnxruntime {onnxruntime.__version__}"
    with tempfile.TemporaryDirectory() as name:
        if arguments.voice:
            heads, rows = _voice(Path(name), arguments.rounds)
        else:
            heads, rows = _random(Path(name), arguments.rounds)
    print_table(setting, heads, rows, arguments.format)
    return 0


def _random(folder: Path, rounds: int) -> tuple[list[str], list[list[str]]]:
    heads = ["model", "steps", "in planes", "ONNX Runtime", *(f"level {n}" for n in LEVELS)]
    rows = []
    for kind, hidden, steps in CASES:
        model = _model(kind, hidden, steps)
        path = folder / f"{kind}_{hidden}_{steps}.onnx"
        path.write_bytes(model.SerializeToString())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UncalibratedWarning)
            # The last product is a layer in any case, so that there is a bank.
            report = build_bank(path, folder / "m.bank", levels=LEVELS, progress=False, workers=1)
        feed = {"x": np.random.default_rng(1).standard_normal((steps, 1, hidden), np.float32)}
        with contextlib.ExitStack() as stack:
            runs: dict[str, Run] = {"": _onnxruntime(path, feed)}
            for level in LEVELS:
                session = stack.enter_context(Session(folder / "m.bank", level=level, threads=1))
                runs[str(level)] = lambda session=session, feed=feed: session.run(None, feed)
            us = _median_us(runs, rounds)
        rows.append(
            [
                f"{LAYERS} {kind} of {hidden}",
                str(steps),
                f"{report.coverage:.0%}",
                f"{us['']:.0f} us",
                *(f"{us[str(level)] / us['']:.2f}" for level in LEVELS),
            ]
        )
    return heads, rows


def _voice(folder: Path, rounds: int) -> tuple[list[str], list[list[str]]]:
    model, path = detector_path(), folder / "voice.bank"
    floats = open_detector(model)
    collected = [feed for feed, _ in listen(floats.run, conversation(range(100, 112)))]
    data = {name: np.stack([each[name] for each in collected]) for name in collected[0]}
    report = build_bank(model, path, calibration=data, levels=LEVELS, progress=False, workers=1)
    print(f"coverage {report.coverage:.1%}; {report.weights_in_float or 'nothing'} in float\n")
    sound = conversation(range(16))
    wanted = _hears(floats.run, sound)
    one = collected[-1]
    rows = []
    with contextlib.ExitStack() as stack:
        runs: dict[str, Run] = {"float32": _onnxruntime(model, one)}
        for name, how in (
            *((f"level {level}", {"level": level}) for level in LEVELS),
            ("5 bits", {"bits": 5}),
        ):
            session = stack.enter_context(Session(path, threads=1, **how))
            otherwise = int((_hears(session.run, sound) != wanted).sum())
            runs[name] = lambda session=session: session.run(None, one)
            weight_bytes = session.stats().resident_bytes
            rows.append([name, format_mib(weight_bytes), f"{otherwise} of {len(wanted)}"])
        us = _median_us(runs, rounds)
    for row in rows:
        row.append(f"{us[row[0]] / us['float32']:.2f}")
    whole = format_mib(
        4 * sum(layer.rows * layer.columns for layer in Bank.open(path).manifest.layers)
    )
    rows.insert(0, ["float32", whole, "", f"{us['float32']:.0f} us"])
    return ["plan", "weights", "frames otherwise", "time of a frame"], rows


def _hears(run: Callable[..., Any], sound: np.ndarray) -> np.ndarray:
    """Whether a voice is heard in each frame, (frames,)."""
    return np.array([chance > 0.5 for _, chance in listen(run, sound)])


def _model(kind: str, hidden: int, steps: int) -> onnx.ModelProto:
    """`LAYERS` recurrent nodes one behind the other, and a product behind them."""
    rng = np.random.default_rng(0)
    constants = {"axis": np.array([1]), "out": _uniform(rng, hidden, 64)}
    nodes, x = [], "x"
    for number in range(LAYERS):
        sizes = {"w": (hidden, hidden), "r": (hidden, hidden)}
        inputs = [f"{name}{number}" for name in ("w", "r", "b")]
        for name, (rows, columns) in zip(inputs, sizes.values(), strict=False):
            constants[name] = _uniform(rng, 1, GATES[kind] * rows, columns)
        constants[inputs[2]] = _uniform(rng, 1, 2 * GATES[kind] * hidden)
        names = {"name": f"layer{number}", "hidden_size": hidden}
        nodes.append(helper.make_node(kind, [x, *inputs], [f"y{number}"], **names))
        nodes.append(helper.make_node("Squeeze", [f"y{number}", "axis"], [f"x{number}"]))
        x = f"x{number}"
    nodes.append(helper.make_node("MatMul", [x, "out"], ["y"], "product"))
    graph = helper.make_graph(
        nodes,
        "recurrent",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [steps, 1, hidden])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _uniform(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """As PyTorch begins: uniform within one over the root of the columns."""
    return rng.uniform(-1, 1, shape).astype(np.float32) * np.float32(shape[-1] ** -0.5)


def _one_thread() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    return options


def _onnxruntime(path: Path, feed: Feed) -> Run:
    session = onnxruntime.InferenceSession(path, _one_thread())
    return lambda: session.run(None, dict(feed))


def _median_us(runs: Mapping[str, Run], rounds: int) -> dict[str, float]:
    times: dict[str, list[int]] = {name: [] for name in runs}
    for name in [*runs] * rounds:
        begin = time.process_time_ns()
        runs[name]()
        times[name].append(time.process_time_ns() - begin)
    return {name: statistics.median(each) / 1000 for name, each in times.items()}


if __name__ == "__main__":
    sys.exit(main())
