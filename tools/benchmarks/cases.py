"""The data that each model of the zoo is calibrated with, run on and judged by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from benchmarks.zoo.digits import INPUT_NAMES, DigitsModel, split_of
from benchmarks.zoo.minilm import encode, minilm_dir
from benchmarks.zoo.sentences import load_sentences

__all__ = ["Case", "Feed", "judge", "load_case", "relative_error"]

Feed = dict[str, np.ndarray]

RANDOM_IMAGES = 4


@dataclass(frozen=True)
class Case:
    """Data of one model; held-out data is never calibrated with."""

    calibration: Feed
    held_out: list[Feed]
    """Inputs of the runs that errors are measured on."""
    single: Feed
    """Input of one run, for memory and latency: one image, or one sentence of 64 tokens."""
    judged_output: str = ""
    """Output that holds the answer; none where the weights are random."""
    labels: np.ndarray | None = None
    """Right classes of the held-out data, (samples,), of a classifier."""
    ends_in_softmax: bool = False
    """Whether errors are those of the Softmax's input: between random scores, which are far apart,
    the Softmax drowns the errors of most and blows up those of a few."""


def load_case(name: str, model_path: Path) -> Case:
    """Data of the zoo's model of that name; `model_path` is its ONNX file."""
    if name == "digits_cnn":
        return _digits("cnn", "logits")
    if name == "digits_mlp":
        return _digits("mlp", "probabilities")
    if name == "digits_resnet":
        return _digits("resnet", "logits")
    if name == "minilm":
        return _sentences()
    return _random_images(model_path)


def _digits(kind: DigitsModel, output: str) -> Case:
    split = split_of(kind)
    x = INPUT_NAMES[kind]
    held_out = {x: split.x_test}
    return Case(
        {x: split.x_calibration}, [held_out], {x: split.x_test[:1]}, output, labels=split.y_test
    )


def _sentences() -> Case:
    """One sentence a run: a runtime that scales a whole batch at once is not put at a loss."""
    calibration, held_out = load_sentences()
    directory = minilm_dir()
    return Case(
        encode(calibration, directory),
        [encode([sentence], directory) for sentence in held_out],
        encode([" ".join(held_out[:12])], directory),  # cut to 64 tokens
        "sentence_embedding",
    )


def _random_images(model_path: Path) -> Case:
    graph = onnx.load(model_path).graph
    (value,) = graph.input
    shape = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
    random = np.random.default_rng(1)
    images = random.standard_normal((2 * RANDOM_IMAGES, *shape), np.float32)
    held_out = [{value.name: image} for image in images[RANDOM_IMAGES:]]
    calibration = np.concatenate(images[:RANDOM_IMAGES])
    softmax = graph.node[-1].op_type == "Softmax"
    return Case({value.name: calibration}, held_out, held_out[0], ends_in_softmax=softmax)


def relative_error(case: Case, found: list[np.ndarray], reference: list[np.ndarray]) -> float:
    """L2 norm of the difference over that of the reference, over all arrays together."""
    difference, size = 0.0, 0.0
    for value, expected in zip(_compared(case, found), _compared(case, reference), strict=True):
        difference += float(np.sum(np.square(value - expected)))
        size += float(np.sum(np.square(expected)))
    return float(np.sqrt(difference / size))


def _compared(case: Case, outputs: list[np.ndarray]) -> list[np.ndarray]:
    """The outputs as float64, or the scores of zero mean that the Softmax makes them from."""
    exact = [output.astype(np.float64) for output in outputs]
    if not case.ends_in_softmax:
        return exact
    scores = [np.log(np.maximum(x, np.finfo(np.float32).smallest_subnormal)) for x in exact]
    return [x - x.mean(axis=1, keepdims=True) for x in scores]


def judge(
    case: Case, found: list[np.ndarray], reference: list[np.ndarray]
) -> dict[str, int | float]:
    """Quality of the judged output: `right` and `lost` samples, or the mean `cosine`.

    A sample is lost when float32 (`reference`) has it right and `found` has not.
    """
    answers, expected = np.concatenate(found), np.concatenate(reference)
    if case.labels is None:
        norms = np.linalg.norm(answers, axis=1) * np.linalg.norm(expected, axis=1)
        return {"cosine": float(np.mean(np.sum(answers * expected, axis=1) / norms))}
    right = answers.argmax(axis=1) == case.labels
    lost = ~right & (expected.argmax(axis=1) == case.labels)
    return {"samples": len(right), "right": int(right.sum()), "lost": int(lost.sum())}
