"""--dataset and what belongs to it, for the experiments on a CNN."""

from __future__ import annotations

import argparse
from pathlib import Path

import onnx

from bapq_edge.errors import ModelFormatError, RequestError
from bapq_edge.input_files import check_input_file
from bapq_tools.build_support.progress import Progress
from experiments.cnn_training import train_cnn
from experiments.datasets import CIFAR10_MD5, Images, load_cifar10, load_digits, read_checksums
from experiments.networks import cnn_to_onnx

__all__ = ["add_dataset", "cnn_of", "images_of", "load_network"]

_EPOCHS = {"digits": 40, "cifar10": 12}


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """Add --dataset, --data-dir, --checksums, --batch-size, --epochs and --model."""
    parser.add_argument("--dataset", choices=("digits", "cifar10"), default="digits")
    parser.add_argument("--data-dir", type=Path, help="folder of CIFAR-10's python batches")
    parser.add_argument(
        "--checksums",
        type=Path,
        metavar="FILE",
        help="what md5sum printed of batches of your own; without it they must be the published",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images at once (default: 64)")
    parser.add_argument("--epochs", type=int, help="of the training (default: 40; cifar10: 12)")
    parser.add_argument(
        "--model", type=Path, help="load this CNN; without it one is trained for each run"
    )


def images_of(arguments: argparse.Namespace) -> Images:
    """The images that were asked for. Raises InputFileError or RequestError."""
    for name in ("batch_size", "epochs"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise RequestError(f"--{name.replace('_', '-')} is {value}, it must be at least 1")
    if arguments.model is not None:
        check_input_file(arguments.model)
    if arguments.dataset == "digits":
        return load_digits()
    checksums = read_checksums(arguments.checksums) if arguments.checksums else CIFAR10_MD5
    return load_cifar10(arguments.data_dir or Path("."), checksums)


def cnn_of(arguments: argparse.Namespace, images: Images, seed: int) -> onnx.ModelProto:
    """The CNN that was named, or one trained on the images with this seed."""
    if arguments.model is not None:
        return load_network(arguments.model)
    epochs, size = arguments.epochs or _EPOCHS[arguments.dataset], arguments.batch_size
    steps = epochs * -(-len(images.x_train) // size)
    with Progress(True).stage("train", steps) as advance:
        parameters = train_cnn(
            images.x_train,
            images.y_train,
            seed=seed,
            epochs=epochs,
            batch_size=size,
            advance=advance,
        )
    return cnn_to_onnx(parameters, images.x_train.shape[1:])


def load_network(path: Path) -> onnx.ModelProto:
    """The model of an .onnx file. Raises ModelFormatError."""
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf raises classes without a common base
        raise ModelFormatError(f"{path} is no ONNX model: {error}") from None
