"""`make demo`: memory, time and answers of a model under a budget, and of ONNX Runtime in float32.

It compiles two models into banks below build/demo: MiniLM, whose memory matters, then a tiny CNN,
whose memory does not. Every row of a table is a process of its own, so that its peak memory is its
own too. The processes answer in turns, one sample each, so that all of them meet the same machine.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
WORK = REPOSITORY / "build" / "demo"
FLOAT32 = "float32"
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Demo:
    """One model, with what it is compiled from and judged by."""

    name: str
    title: str
    output: str
    runs: tuple[str, ...]
    """settings of `bapq_edge.Session` for each row, such as "level=8 memory_budget=16MiB\""""
    levels: tuple[int, ...]
    make: Callable[[Path], tuple[Arrays, Arrays]]
    """writes the ONNX file; gives samples to calibrate with, and others to answer"""
    judge: Callable[[np.ndarray, np.ndarray], str]
    """says of answers, and of those in float32, how good they are"""


def make_minilm(model: Path) -> tuple[Arrays, Arrays]:
    """Sixty-four sentences are enough to show calibration; five hundred are better."""
    from benchmarks.zoo.minilm import build_minilm, encode, minilm_dir
    from benchmarks.zoo.sentences import load_sentences

    directory = minilm_dir()
    build_minilm(directory, model)
    calibration, held_out = load_sentences()
    return encode(calibration[:64], directory), encode(held_out[:200], directory)


def make_digits(model: Path) -> tuple[Arrays, Arrays]:
    """The bundled CNN, its calibration images and its test images."""
    from benchmarks.zoo import make_model
    from benchmarks.zoo.digits import split_of

    make_model("digits_cnn", model)
    split = split_of("cnn")
    return {"image": split.x_calibration}, {"image": split.x_test}


def mean_cosine(answers: np.ndarray, reference: np.ndarray) -> str:
    """Of the sentences' embeddings, which have unit length."""
    return f"cosine {(answers * reference).sum(axis=1).mean():.4f}"


def right_answers(answers: np.ndarray, reference: np.ndarray) -> str:
    """How many images get the class that is true."""
    from benchmarks.zoo.digits import split_of

    labels = split_of("cnn").y_test
    return f"{(answers.argmax(axis=1) == labels).sum()}/{len(labels)} right"


DEMOS = (
    Demo(
        name="minilm",
        title="MiniLM-L6-v2, 22.5 million weights, on 200 sentences that it has not seen",
        output="sentence_embedding",
        runs=("level=8", "level=8 memory_budget=16MiB", "level=4"),
        levels=(8, 4),
        make=make_minilm,
        judge=mean_cosine,
    ),
    Demo(
        name="digits",
        title="Digits CNN, 0.09 million weights, on 600 test images",
        output="logits",
        runs=("level=8", "level=2", "level=1"),
        levels=(8, 4, 2, 1),
        make=make_digits,
        judge=right_answers,
    ),
)


def answer(name: str, output: str, run: str) -> None:
    """Answer samples in this process, as their numbers come from stdin; then tell its memory."""
    from bapq_edge.telemetry import peak_rss_bytes, rss_bytes

    with np.load(WORK / f"{name}_samples.npz") as arrays:
        samples = dict(arrays)
    before_bytes = rss_bytes()
    session = open_session(name, run)
    for line in sys.stdin:
        feed = {key: array[int(line)][np.newaxis] for key, array in samples.items()}
        started_s = time.perf_counter()
        (value,) = session.run([output], feed)
        run_s = time.perf_counter() - started_s
        print(json.dumps([run_s, value[0].tolist()]), flush=True)
    print(peak_rss_bytes() - before_bytes)


def open_session(name: str, run: str) -> Any:
    """A session on one thread: ONNX Runtime's for "float32", else ours with these settings."""
    import onnxruntime

    import bapq_edge

    if run == FLOAT32:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(str(WORK / f"{name}.onnx"), options)
    settings: dict[str, Any] = dict(setting.split("=") for setting in run.split())
    return bapq_edge.Session(WORK / f"{name}.bank", threads=1, **settings)


def compile_model(demo: Demo) -> int:
    """Write model, bank and samples below WORK; the number of samples."""
    import bapq_tools

    model = WORK / f"{demo.name}.onnx"
    calibration, samples = demo.make(model)
    np.savez(WORK / f"{demo.name}_samples.npz", **samples)
    np.savez(WORK / f"{demo.name}.npz", **{key: array[:1] for key, array in samples.items()})
    bank = WORK / f"{demo.name}.bank"
    bapq_tools.build_bank(model, bank, calibration=calibration, levels=demo.levels)
    return len(next(iter(samples.values())))


def measure(demo: Demo, sample_count: int) -> None:
    """Answer all samples in each way, and print the table."""
    from bapq_edge.units import format_size

    runs = (FLOAT32, *demo.runs)
    command = [sys.executable, __file__, demo.name, demo.output]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, run], **pipes) for run in runs]
    results: list[list[Any]] = [[] for _ in runs]
    for sample in range(sample_count):
        for process, result in zip(processes, results, strict=True):
            process.stdin.write(f"{sample}\n")
            process.stdin.flush()
            result.append(json.loads(process.stdout.readline()))

    print(f"\n{demo.title}; one thread\n")
    print(f"{'':36}  {'memory':>9}  {'one run':>9}  answers")
    reference = np.array([answer for _, answer in results[0]])
    for run, process, result in zip(runs, processes, results, strict=True):
        times_s, answers = zip(*result, strict=True)
        memory = format_size(int(process.communicate()[0]))
        time_ms = statistics.median(times_s) * 1e3
        title = f"{'ONNX Runtime' if run == FLOAT32 else 'bapq'}, {run}"
        quality = demo.judge(np.array(answers), reference)
        print(f"{title:36}  {memory:>9}  {time_ms:6.2f} ms  {quality}")
    print(flush=True)


def main() -> None:
    """Compile, measure and show one model after the other."""
    WORK.mkdir(parents=True, exist_ok=True)
    for demo in DEMOS:
        print(f"{demo.name}: from ONNX to a bank, calibrated", file=sys.stderr)
        sample_count = compile_model(demo)
        print(f"{demo.name}: answering {sample_count} samples in each way", file=sys.stderr)
        measure(demo, sample_count)
    print(
        "Memory is what the process's peak grew by. A tiny model gains nothing: its memory is that"
    )
    print("of ONNX Runtime itself. Cosines are against float32.\n")
    print("Next: .venv/bin/bapq inspect build/demo/minilm.bank")
    print(
        "      the ten lines of Python in README.md; docs/guide/own_model.md for a model of yours"
    )


if __name__ == "__main__":
    if len(sys.argv) == 4:
        answer(*sys.argv[1:])
    else:
        main()
