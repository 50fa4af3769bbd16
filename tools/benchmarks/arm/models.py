"""The models that are measured, prepared for every engine in a folder of their own.

A folder holds model.onnx, int8.onnx, model.bank, input.npz (the input of one run) and, for ncnn,
the folder ncnn with its model and the types of its inputs.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import version_converter

import bapq_edge
import bapq_tools
from bapq_edge.errors import BapqWarning
from benchmarks.cases import load_case
from benchmarks.zoo import make_model

from .mobilenet import build_mobilenet_v2

__all__ = ["MODELS", "prepare"]

MODELS = {
    "squeezenet": "SqueezeNet 224",
    "resnet50": "ResNet-50 224",
    "mobilenet_v2": "MobileNetV2 224",
    "minilm_16": "MiniLM 1×16",
    "minilm_64": "MiniLM 1×64",
    "digits_cnn": "digits CNN",
    "digits_mlp": "digits MLP",
    "digits_resnet": "digits ResNet",
}
"""name of a model's folder -> its name in the table"""
_CALIBRATION_SAMPLES = 4
"""the number of instructions does not depend on what the scales are"""
_QDQ_OPSET = 13
"""the first whose DequantizeLinear has a scale per channel"""

_Feed = dict[str, np.ndarray]


def prepare(name: str, folder: Path, pnnx: Path | None) -> dict[str, str]:
    """Write what is not there yet, or old; why there is nothing for an engine, by its name.

    `pnnx` is ncnn's converter, if there is one.
    """
    if _older(folder / "input.npz", [Path(__file__).parent]):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model.onnx"
    if not (folder / "input.npz").exists():
        feed = _write_model(name, model)
        np.savez(folder / "input.npz", **feed)
    with np.load(folder / "input.npz") as arrays:
        feed = {key: arrays[key] for key in arrays.files}
    bank = folder / "model.bank"
    packages = [Path(bapq_tools.__file__).parent, Path(bapq_edge.__file__).parent / "bank"]
    if _older(bank, packages):
        shutil.rmtree(bank)
    dynamic = name.startswith("minilm")
    samples = None if dynamic else list(_samples(feed))
    _once(bank, lambda out: _build_bank(model, samples, out))
    quantize = _quantize_dynamic if dynamic else _quantize
    reasons = {
        "int8": _once(folder / "int8.onnx", lambda out: quantize(model, feed, out)),
        "ncnn": "not installed: pnnx",
    }
    if pnnx is not None:
        reasons["ncnn"] = _once(folder / "ncnn", lambda out: _convert(model, feed, out, pnnx))
    return {engine: reason for engine, reason in reasons.items() if reason}


def _older(target: Path, packages: list[Path]) -> bool:
    """Whether it is there, but made before the code that makes it was last changed."""
    sources = [file for package in packages for file in package.rglob("*.py")]
    newest_s = max(file.stat().st_mtime for file in sources)
    return target.exists() and target.stat().st_mtime < newest_s


def _once(target: Path, make: Callable[[Path], None]) -> str:
    """Make a file or directory, which appears only when it is complete; why that failed."""
    if target.exists():
        return ""
    part = target.with_name(f"part.{target.name}")
    if part.is_dir():
        shutil.rmtree(part)
    part.unlink(missing_ok=True)
    try:
        make(part)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    part.rename(target)
    return ""


def _write_model(name: str, out: Path) -> _Feed:
    """Write the ONNX file; the input of one run."""
    if name == "mobilenet_v2":
        build_mobilenet_v2(out)
        return load_case(name, out).single
    if name.startswith("minilm"):
        make_model("minilm", out)
        tokens = int(name.rpartition("_")[2])
        single = load_case("minilm", out).single
        return {key: value[:, :tokens] for key, value in single.items()}
    make_model(name, out)
    return load_case(name, out).single


def _build_bank(model: Path, samples: list[_Feed] | None, out: Path) -> None:
    """Calibrated where the int8 model is: it makes a convolution's runs under one scale longer."""
    calibration = samples and {
        name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BapqWarning)  # few samples, or none
        bapq_tools.build_bank(
            model, out, calibration=calibration, levels=(32, 8, 4, 2, 1), progress=False
        )


def _quantize_dynamic(model: Path, feed: _Feed, out: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    logging.disable(logging.WARNING)  # it advises to run shape inference first, to no effect here
    quantize_dynamic(model, out)


def _quantize(model: Path, feed: _Feed, out: Path) -> None:
    """ONNX Runtime's static int8: QDQ with scales per channel."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Samples(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = _samples(feed)

        def get_next(self) -> _Feed | None:
            return next(self.feeds, None)

    loaded = onnx.load(model)
    if min(entry.version for entry in loaded.opset_import if not entry.domain) < _QDQ_OPSET:
        loaded = version_converter.convert_version(loaded, _QDQ_OPSET)
    optimized = out.with_name("int8_source.onnx")
    onnx.save(loaded, optimized)
    quant_pre_process(optimized, optimized, skip_symbolic_shape=True)
    quantize_static(
        optimized,
        out,
        Samples(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        # ONNX Runtime 1.32 fails in it at a Gemm with scales per channel.
        extra_options={"QDQDisableWeightAdjustForInt32Bias": True},
    )
    optimized.unlink()


def _samples(feed: _Feed) -> Iterator[_Feed]:
    random = np.random.default_rng(0)
    for _ in range(_CALIBRATION_SAMPLES):
        yield {
            name: (value * random.uniform(0.5, 1.5, value.shape)).astype(value.dtype)
            for name, value in feed.items()
        }


def _convert(model: Path, feed: _Feed, out: Path, pnnx: Path) -> None:
    """ncnn's model, and the types of its inputs in order."""
    out.mkdir()
    loaded = onnx.load(model)
    for name in _take_floats(loaded.graph):
        feed = {**feed, name: feed[name].astype(np.float32)}
    onnx.save(loaded, out / "model.onnx")
    kinds = {"float32": "f32", "int64": "i64"}
    shapes = ",".join(
        f"[{','.join(map(str, value.shape))}]{kinds[str(value.dtype)]}" for value in feed.values()
    )
    command = [str(pnnx), "model.onnx", f"inputshape={shapes}", "fp16=0"]
    result = subprocess.run(command, cwd=out, capture_output=True, text=True)
    parameters = out / "model.ncnn.param"
    if result.returncode != 0 or not parameters.exists():
        lines = (result.stdout + result.stderr).strip().splitlines()
        raise RuntimeError(f"pnnx: {lines[-1] if lines else result.returncode}")
    unknown = _unknown_operators(parameters)
    if unknown:
        raise RuntimeError(f"pnnx: ncnn has no {', '.join(sorted(unknown))}")
    types = {"float32": "float32", "int64": "int32"}
    inputs = {name: types[str(value.dtype)] for name, value in feed.items()}
    (out / "inputs.json").write_text(json.dumps(inputs))
    for file in out.iterdir():
        if file.suffix not in (".param", ".bin", ".json") or ".pnnx." in file.name:
            file.unlink()


def _take_floats(graph: onnx.GraphProto) -> list[str]:
    """Take the Cast from inputs that are floats from then on, their names: ncnn has none."""
    casts = {node.input[0]: node for node in graph.node if node.op_type == "Cast"}
    changed = [value for value in graph.input if value.name in casts]
    for value in changed:
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        casts[value.name].op_type = "Identity"
        del casts[value.name].attribute[:]
    return [value.name for value in changed]


def _unknown_operators(parameters: Path) -> set[str]:
    """Operators that pnnx left as they were in the source: ncnn's have plain names."""
    lines = parameters.read_text().splitlines()[2:]
    return {kind for kind in (line.split()[0] for line in lines) if "." in kind or ":" in kind}
