"""Nested levels of a trained network: accuracy, memory, time, switches and a budget trace.

    python tools/experiments/run_quantization_switching_cnn.py --dataset digits --runs 5
    python tools/experiments/run_quantization_switching_cnn.py --dataset cifar10 --data-dir FOLDER
    python tools/experiments/run_quantization_switching_cnn.py --zoo minilm --output minilm.csv
    python tools/experiments/run_quantization_switching_cnn.py --model MODEL.onnx --samples X.npz

With digits it is the bundled CNN; with CIFAR-10 one is trained, unless --model names one. --zoo
takes a model of benchmarks.zoo with its own samples instead, --samples any model with yours: an
array per input, samples on the first axis; half of them calibrate. Rows and files are those of
run_quantization_switching_synthetic.py; where there are no labels, the accuracy is the mean cosine
of the first output with float32's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnx

from bapq_edge.array_files import read_arrays
from bapq_edge.errors import RequestError
from bapq_tools import build_bank
from benchmarks.cases import load_case
from benchmarks.zoo import make_model
from benchmarks.zoo.digits import digits_cnn_path
from experiments.images_option import add_dataset, cnn_of, images_of, load_network
from experiments.results import Parser, run_script
from experiments.switching import Task
from experiments.switching_report import report_switching


def main(arguments: argparse.Namespace) -> None:
    """Train or load, build, measure, write and draw."""
    with tempfile.TemporaryDirectory() as folder:
        model, bank = Path(folder) / "model.onnx", Path(folder) / "model.bank"
        make = _zoo_task if arguments.zoo else _samples_task if arguments.samples else _images_task
        task = make(arguments, model, bank)
        report_switching(task, arguments.runs, arguments.output)


def _images_task(arguments: argparse.Namespace, model: Path, bank: Path) -> Task:
    if arguments.dataset == "digits" and arguments.model is None:
        arguments.model = digits_cnn_path()
    images = images_of(arguments)
    network = cnn_of(arguments, images, seed=0)
    onnx.save(network, model)
    name, output = network.graph.input[0].name, network.graph.output[0].name
    build_bank(model, bank, calibration={name: images.x_calibration}, progress=False)
    size = arguments.batch_size
    batches = [
        {name: images.x_test[begin : begin + size]} for begin in range(0, len(images.x_test), size)
    ]
    return Task(model, bank, {name: images.x_test[:1]}, batches, output, images.y_test)


def _samples_task(arguments: argparse.Namespace, model: Path, bank: Path) -> Task:
    if arguments.model is None:
        raise RequestError("--samples are given without --model: name the model that takes them")
    network = load_network(arguments.model)
    onnx.save(network, model)
    inputs = {value.name for value in network.graph.input}
    found = read_arrays(arguments.samples)
    found = {next(iter(inputs)): found} if isinstance(found, np.ndarray) else found
    arrays = {name: array for name, array in found.items() if name in inputs}
    half = min((len(array) for array in arrays.values()), default=0) // 2
    if not half or set(arrays) != inputs:
        raise RequestError(
            f"{arguments.samples} needs two samples at least of each of {', '.join(sorted(inputs))}"
        )
    calibration = {name: array[:half] for name, array in arrays.items()}
    build_bank(model, bank, calibration=calibration, progress=False)
    held_out = [
        {name: array[index : index + 1] for name, array in arrays.items()}
        for index in range(half, 2 * half)
    ]
    return Task(model, bank, held_out[0], held_out, network.graph.output[0].name)


def _zoo_task(arguments: argparse.Namespace, model: Path, bank: Path) -> Task:
    make_model(arguments.zoo, model)
    case = load_case(arguments.zoo, model)
    build_bank(model, bank, calibration=case.calibration, progress=False)
    held_out = case.held_out if case.labels is not None else case.held_out[: arguments.most]
    return Task(model, bank, case.single, held_out, case.judged_output, case.labels)


if __name__ == "__main__":
    parser = Parser(__doc__, "switching_results.csv")
    add_dataset(parser)
    choices = ("digits_cnn", "digits_mlp", "digits_resnet", "minilm")
    parser.add_argument("--zoo", choices=choices, help="take this model and its samples instead")
    parser.add_argument(
        "--most", type=int, metavar="N", help="sentences of --zoo to judge by (default: all)"
    )
    parser.add_argument("--samples", type=Path, metavar="X.npz", help="samples for --model")
    sys.exit(run_script(main, parser))
