"""TFLite models: converted, checked, and run behind the methods of TensorFlow Lite's interpreter.

LiteRT, the real library, is on the other side.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
from ai_edge_litert.interpreter import Interpreter as LiteRT

from bapq_edge import Session
from bapq_edge.compat import tflite
from bapq_edge.compat.tflite import Interpreter
from bapq_edge.compat.tflite_facts import KEY, TFLiteFacts
from bapq_edge.errors import (
    BankFormatError,
    BankNotFoundError,
    IgnoredSettingWarning,
    InputFileError,
    MissingExtraError,
    ModelFormatError,
    RequestError,
    RunInputError,
    UncalibratedWarning,
    UnsupportedModelError,
)
from bapq_tools import build_bank
from bapq_tools.calibration.tflite_check import check_conversion
from bapq_tools.onnx_graph.importers import tflite_file
from bapq_tools.onnx_graph.importers.tflite_file import convert_tflite
from support.command_line import bapq
from support.stripes import stripes

MODELS = Path(__file__).parents[1] / "tflite_models"
IMAGES = ("images_float32", "images_float16", "images_dynamic", "images_int8")
RANDOM = np.random.default_rng(5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every model with its bank beside it, at all levels."""
    place = tmp_path_factory.mktemp("tflite")
    for name in (*IMAGES, "two"):
        model = Path(shutil.copy(MODELS / f"{name}.tflite", place))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UncalibratedWarning)
            build_bank(
                model, model.with_suffix(".bank"), levels=(32, 8, 4), progress=False, workers=1
            )
    return place


def litert(path):
    interpreter = LiteRT(str(path), num_threads=1)
    interpreter.allocate_tensors()
    return interpreter


def images(count, details):
    """Stripes for the input that these are the details of."""
    scale, zero_point = details["quantization"]
    values = stripes(count, seed=4)[0]
    if scale:
        values = np.clip(np.round(values / scale + zero_point), -128, 127)
    return values.astype(details["dtype"])


def answer(interpreter, value):
    """What both kinds of interpreters say, called alike."""
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], value)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


# ---- the bank of a .tflite file ----


@pytest.mark.parametrize("name", IMAGES)
def test_a_bank_answers_as_litert_does(folder, name):
    real = litert(folder / f"{name}.tflite")
    inputs = images(100, real.get_input_details()[0])
    expected = [answer(real, image[None])[0] for image in inputs]
    with Interpreter(folder / f"{name}.bank", level=8) as interpreter:
        interpreter.allocate_tensors()
        found = [answer(interpreter, image[None])[0] for image in inputs]
    assert found[0].dtype == expected[0].dtype
    best = [value == value.max() for value in expected]  # integers have ties
    right = [best[i][value.argmax()] for i, value in enumerate(found)]
    assert np.mean(right) >= 0.97
    assert len({value.argmax() for value in expected}) == 10, "a model of one answer shows nothing"


def test_level_32_of_a_float_model_is_litert(folder):
    real = litert(folder / "images_float32.tflite")
    image = images(1, real.get_input_details()[0])
    with Interpreter(folder / "images_float32.bank", level=32) as interpreter:
        interpreter.allocate_tensors()
        np.testing.assert_allclose(
            answer(interpreter, image), answer(real, image), rtol=1e-4, atol=1e-6
        )


def test_the_bank_names_the_file_that_it_came_from(folder):
    with Session(folder / "two.bank") as session:
        source = session.internals.bank.manifest.model
    assert source.name == "two.tflite"
    assert source.bytes == (folder / "two.tflite").stat().st_size


def test_calibration_arrays_have_the_names_in_the_file(folder, tmp_path):
    (details,) = litert(folder / "images_int8.tflite").get_input_details()
    samples = {details["name"]: images(8, details)}
    report = build_bank(
        folder / "images_int8.tflite", tmp_path / "m.bank", calibration=samples, progress=False
    )
    assert report.calibration_samples == 8
    assert "check" in report.stage_seconds


# ---- what cannot be converted ----


def test_what_is_stored_sparse_is_told_in_one_line(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"sparse\.tflite: tensor .* is stored sparse"):
        build_bank(MODELS / "sparse.tflite", tmp_path / "m.bank", progress=False)
    arguments = ("build", MODELS / "sparse.tflite", "-o", tmp_path / "m.bank", "--quiet")
    _, said = bapq(*arguments, code=UnsupportedModelError.exit_code)
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "m.bank").exists()


def test_state_is_told_by_the_operators_that_keep_it():
    with pytest.raises(UnsupportedModelError, match=r"keeps state from run to run \(.*VAR_HANDLE"):
        convert_tflite(MODELS / "stateful.tflite")


def test_a_broken_file_is_told_as_one(tmp_path):
    whole = (MODELS / "images_float32.tflite").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no model at all", whole[:8] + whole[400:]):
        (tmp_path / "m.tflite").write_bytes(content)
        with pytest.raises((ModelFormatError, UnsupportedModelError), match=r"m\.tflite: "):
            convert_tflite(tmp_path / "m.tflite")
    with pytest.raises(InputFileError):
        convert_tflite(tmp_path / "absent.tflite")


def test_without_the_extra_its_name_is_told(monkeypatch):
    monkeypatch.setattr(tflite_file, "_PACKAGES", ("no_such_package",))
    with pytest.raises(MissingExtraError, match=r"no_such_package.*\[tflite\]"):
        convert_tflite(MODELS / "two.tflite")


@pytest.mark.parametrize("part", ["plain", "model"])
def test_a_wrong_conversion_is_refused_with_its_operator(part):
    path = MODELS / "images_float32.tflite"
    converted = convert_tflite(path)
    wrong = onnx.ModelProto()
    wrong.CopyFrom(getattr(converted, part))
    next(n for n in wrong.graph.node if n.op_type == "Relu").op_type = "Abs"
    words = r"operator \d+ \(CONV_2D\), tensor .* error of" if part == "plain" else "output .*"
    with pytest.raises(UnsupportedModelError, match=words):
        check_conversion(path, dataclasses.replace(converted, **{part: wrong}), None)
    check_conversion(path, converted, None)


def test_the_conversion_needs_no_tensorflow():
    script = f"""
import sys
from importlib.abc import MetaPathFinder
class Refuse(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        assert name.partition(".")[0] != "tensorflow", name
sys.meta_path.insert(0, Refuse())
from bapq_tools.onnx_graph.importers.tflite_file import convert_tflite
convert_tflite({str(MODELS / "two.tflite")!r})
assert "tensorflow" not in sys.modules and "tf2onnx" not in sys.modules
"""
    environment = {"PYTHONPATH": str(Path(tflite_file.__file__).parents[3])}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


# ---- the interpreter ----


@pytest.mark.parametrize("name", [*IMAGES, "two"])
def test_details_and_signatures_are_those_of_litert(folder, name):
    real = litert(folder / f"{name}.tflite")
    with Interpreter(folder / f"{name}.tflite") as own:
        own.allocate_tensors()
        assert own.get_signature_list() == real.get_signature_list()
        for kind in ("get_input_details", "get_output_details"):
            for mine, theirs in zip(getattr(own, kind)(), getattr(real, kind)(), strict=True):
                theirs["quantization_parameters"].pop("block_size", None)  # of newer versions
                for key in set(theirs) - {"index"}:
                    np.testing.assert_equal(mine[key], theirs[key])


SCRIPT = """
import sys
import numpy as np
{line}

interpreter = Interpreter(model_path=sys.argv[1], num_threads=1)
interpreter.allocate_tensors()
read, written = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
scale, zero_point = read["quantization"]
for image in np.load(sys.argv[2]):
    assert image.shape == tuple(read["shape"][1:])
    if scale:
        image = np.clip(np.round(image / scale + zero_point), -128, 127)
    interpreter.tensor(read["index"])()[0] = image.astype(read["dtype"])
    interpreter.invoke()
    print(np.squeeze(interpreter.get_tensor(written["index"])).argmax())
"""


@pytest.mark.parametrize("name", ["images_float32", "images_int8"])
def test_a_script_runs_with_one_line_changed(folder, tmp_path, name):
    numpy_file, said = tmp_path / "images.npy", []
    np.save(numpy_file, stripes(20, seed=6)[0])
    for module in ("ai_edge_litert.interpreter", "bapq_edge.compat.tflite"):
        script = SCRIPT.format(line=f"from {module} import Interpreter")
        command = [sys.executable, "-c", script, str(folder / f"{name}.tflite"), str(numpy_file)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        said.append(done.stdout)
    assert said[0] == said[1]


def test_a_signature_runs_by_its_names(folder):
    values = {
        side: RANDOM.standard_normal((1, 64)).astype(np.float32) for side in ("left", "right")
    }
    expected = litert(folder / "two.tflite").get_signature_runner("mix")(**values)
    with Interpreter(folder / "two.bank", level=32) as interpreter:
        runner = interpreter.get_signature_runner()
        found = runner(**values)
        assert set(found) == set(expected) == set(runner.get_output_details())
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-5)
        with pytest.raises(RunInputError, match=r"takes \['left', 'right'\].* given \['left'\]"):
            runner(left=values["left"])
        with pytest.raises(RequestError, match=r"signature 'x' is not in the bank"):
            interpreter.get_signature_runner("x")


def test_open_axes_are_resized_as_in_litert(folder):
    batch = stripes(3, seed=4)[0]
    answers = []
    for interpreter in (
        LiteRT(str(folder / "images_float32.tflite")),
        Interpreter(folder / "images_float32.bank", level=32),
    ):
        read, written = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
        interpreter.resize_tensor_input(read["index"], batch.shape)
        interpreter.allocate_tensors()
        assert [*interpreter.get_output_details()[0]["shape"]] == [3, 10]
        interpreter.set_tensor(read["index"], batch)
        interpreter.invoke()
        answers.append(interpreter.get_tensor(written["index"]))
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-4, atol=1e-6)
    with pytest.raises(RunInputError, match=r"is \[-1, 24, 24, 3\], and only an axis of -1"):
        interpreter.resize_tensor_input(read["index"], (1, 48, 48, 3))
    interpreter.close()


def test_wrong_calls_are_told(folder):
    image = stripes(1, seed=4)[0]
    with Interpreter(folder / "images_float32.bank") as interpreter:
        with pytest.raises(RequestError, match=r"call allocate_tensors"):
            interpreter.set_tensor(0, image)
        with pytest.raises(RequestError, match=r"call allocate_tensors"):
            interpreter.invoke()
        interpreter.allocate_tensors()
        with pytest.raises(RunInputError, match=r"of type float32, the value is float64"):
            interpreter.set_tensor(0, image.astype(np.float64))
        with pytest.raises(RunInputError, match=r"has shape \[1, 24, 24, 3\], the value \[24"):
            interpreter.set_tensor(0, image[0])
        with pytest.raises(RequestError, match="is no input"):
            interpreter.set_tensor(1, image)
        with pytest.raises(RequestError, match="neither input nor output"):
            interpreter.get_tensor(7)
        held = interpreter.get_tensor(1)
        answer(interpreter, image)
        assert not np.array_equal(held, interpreter.get_tensor(1)), "get_tensor gives copies"
    with pytest.raises(RequestError, match="a bank is a directory"):
        Interpreter(model_content=b"TFL3")
    with pytest.raises(BankNotFoundError, match=r"build it with 'bapq build .*x\.tflite'"):
        Interpreter(folder / "x.tflite")


def test_what_a_bank_cannot_honour_is_warned_of_once(folder, monkeypatch):
    monkeypatch.setattr("bapq_edge.telemetry._told", set())
    delegate = tflite.load_delegate("libedgetpu.so.1", {"device": "usb"})
    settings = {
        "experimental_delegates": [delegate],
        "experimental_op_resolver_type": tflite.OpResolverType.BUILTIN_REF,
    }
    with pytest.warns(IgnoredSettingWarning) as caught:
        Interpreter(folder / "two.bank", **settings).close()
    assert [str(each.message).partition(" is not")[0] for each in caught] == [
        "delegate libedgetpu.so.1",
        "experimental_op_resolver_type",
    ]
    Interpreter(folder / "two.bank", **settings).close()


def test_a_bank_of_another_model_has_the_names_of_its_graph(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UncalibratedWarning)
        model = Path(__file__).parents[2] / "examples" / "models" / "digits_cnn.onnx"
        build_bank(model, tmp_path / "m.bank", progress=False, workers=1)
    with Interpreter(tmp_path / "m.bank") as interpreter:
        (details,) = interpreter.get_input_details()
        assert details["name"] == "image" and details["quantization"] == (0.0, 0)
        assert [*details["shape_signature"]] == [-1, 1, 8, 8]
        assert interpreter.get_signature_list() == {}


@pytest.mark.parametrize(
    "text", ["{", '{"quantization": {"x": {"scales": ["a"], "zero_points": []}}}', '{"more": 1}']
)
def test_malformed_facts_are_refused(text):
    with pytest.raises(BankFormatError, match=r"m\.bank: metadata bapq\.tflite"):
        TFLiteFacts.from_metadata({KEY: text}, "m.bank")


def test_bench_runs_the_file_beside_the_bank(folder):
    model, bank = folder / "images_int8.tflite", folder / "images_int8.bank"
    out, _ = bapq("bench", bank, "--against", model, "--level", "8", "-r", "2", "--json")
    real, own = json.loads(out)
    assert real["name"] == "images_int8.tflite" and real["weight_bytes"] == model.stat().st_size
    assert own["name"] == "level 8" and own["ratio"] > 0
    (folder / "broken.tflite").write_bytes(b"no model")
    _, said = bapq(
        "bench", bank, "--against", folder / "broken.tflite", code=ModelFormatError.exit_code
    )
    assert "broken.tflite: LiteRT refuses it" in said
