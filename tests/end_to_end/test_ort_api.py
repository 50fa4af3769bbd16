"""A session in place of `onnxruntime.InferenceSession`: arguments, methods, and the patch."""

from __future__ import annotations

import logging
import threading
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import bapq_edge
from bapq_edge import Session, patch_onnxruntime
from bapq_edge.errors import (
    BankNotFoundError,
    IgnoredSettingWarning,
    RequestError,
    RunInputError,
    SessionClosedError,
    UncalibratedWarning,
)
from bapq_tools import build_bank
from support.streaming import chain_bank

MODEL = Path(__file__).parents[2] / "examples" / "models" / "digits_cnn.onnx"
X = np.random.default_rng(1).uniform(0, 1, (2, 1, 8, 8)).astype(np.float32)
ALPHABET = "0\n1\n2\n中文"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model.onnx, with metadata of its own, and model.bank."""
    place = tmp_path_factory.mktemp("digits")
    model = onnx.load(MODEL)
    model.metadata_props.add(key="character", value=ALPHABET)
    onnx.save(model, place / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UncalibratedWarning)
        build_bank(place / "model.onnx", place / "model.bank", progress=False, workers=1)
    return place


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    """Every test is warned as a process is that begins."""
    monkeypatch.setattr("bapq_edge.telemetry._told", set())


@pytest.fixture
def session(folder):
    with Session(folder / "model.bank", level=8) as session:
        yield session


@pytest.fixture
def expected(session):
    return session.run(None, {"image": X})[0]


# ---- arguments ----


def test_arguments_are_taken_by_place(folder):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    with Session(folder / "model.bank", options, ["CPUExecutionProvider"], [{}]) as session:
        assert session.get_session_options().intra_op_num_threads == 1
        assert "1 thread" in str(session.events()[-1])
    with Session(folder / "model.bank", options, threads=2) as session:
        assert session.get_session_options().intra_op_num_threads == 2


def test_what_cannot_be_honoured_is_warned_of_once_by_name(folder):
    options = ort.SessionOptions()
    options.enable_cpu_mem_arena = False
    options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    options.log_severity_level = 3
    providers = [
        ("CUDAExecutionProvider", {"device_id": 0}),
        ("CPUExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"}),
    ]
    with pytest.warns(IgnoredSettingWarning) as caught:
        Session(folder / "model.bank", options, providers).close()
    assert sorted(str(each.message).partition(" is not honoured: ")[0] for each in caught) == [
        "SessionOptions.enable_cpu_mem_arena",
        "SessionOptions.execution_mode",
        "option arena_extend_strategy of CPUExecutionProvider",
        "provider CUDAExecutionProvider",
    ]
    assert {each.filename for each in caught} == {__file__}
    Session(folder / "model.bank", options, providers).close()


def test_settings_that_can_be_honoured_reach_the_engine(folder, tmp_path):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.logid = "mine"
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    with Session(folder / "model.bank", options, level=8) as session:
        session.run(None, {"image": X})
        used = session.get_session_options()
        assert used.graph_optimization_level == options.graph_optimization_level
        assert (used.log_severity_level, used.logid) == (3, "mine")
        assert used.get_session_config_entry("session.set_denormal_as_zero") == "1"
        profile = Path(session.end_profiling())
    assert profile.parent == tmp_path and "Conv" in profile.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sess_options": "fast"}, "sess_options is of type str"),
        ({"providers": "CPUExecutionProvider"}, "providers is of type str: give a list"),
        ({"providers": [5]}, "provider 5 is neither a name"),
        ({"providers": ["CPUExecutionProvider"], "provider_options": []}, "options for each"),
        ({"providers": [("A", {})], "provider_options": [{}]}, "names only"),
    ],
)
def test_what_are_no_such_arguments_is_told(folder, arguments, message):
    with pytest.raises(RequestError, match=message):
        Session(folder / "model.bank", **arguments)


# ---- what it tells ----


def test_it_tells_what_onnx_runtime_tells_of_the_model(folder, session):
    real = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    own, theirs = session.get_modelmeta(), real.get_modelmeta()
    assert own.custom_metadata_map == theirs.custom_metadata_map == {"character": ALPHABET}
    for name in ("producer_name", "graph_name", "domain", "description"):
        assert getattr(own, name) == getattr(theirs, name)
    assert session.get_providers() == real.get_providers()
    assert session.get_provider_options() == real.get_provider_options()
    assert session.get_overridable_initializers() == []
    assert session.end_profiling() == real.end_profiling()
    session.set_providers(["CPUExecutionProvider"])
    session.enable_fallback()
    session.disable_fallback()


def test_a_closed_session_tells_nothing(folder):
    session = Session(folder / "model.bank")
    session.close()
    for name in (
        "get_modelmeta",
        "get_session_options",
        "get_providers",
        "get_provider_options",
        "set_providers",
        "io_binding",
        "end_profiling",
        "enable_fallback",
        "disable_fallback",
        "get_overridable_initializers",
        "get_profiling_start_time_ns",
    ):
        with pytest.raises(SessionClosedError):
            getattr(session, name)()


# ---- other ways to run ----


def test_run_async_has_the_manners_of_onnx_runtime(folder, session):
    real = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    told, there = [], threading.Event()

    def callback(outputs, user_data, error):
        told.append((outputs, user_data, error))
        there.set()

    for each in (session, real):
        there.clear()
        assert each.run_async(["logits"], {"image": X}, callback, "mine") is None
        assert there.wait(60)
    for outputs, user_data, error in told:
        assert (user_data, error) == ("mine", "")
        assert outputs[0].shape == (2, 10)
    there.clear()
    session.run_async(None, {"image": X[:, :, :5]}, callback, 7)
    assert there.wait(60)
    assert told[-1][:2] == ([], 7) and "index: 2" in told[-1][2]
    with pytest.raises(RequestError, match="callback is of type NoneType"):
        session.run_async(None, {"image": X}, None, None)
    with pytest.raises(RunInputError, match="the feed has"):
        session.run_async(None, {}, callback, None)


def test_submit_gives_a_future(session, expected):
    np.testing.assert_array_equal(
        session.submit(None, {"image": X}, ort.RunOptions()).result()[0], expected
    )


def test_ort_values_in_and_out(session, expected):
    value = ort.OrtValue.ortvalue_from_numpy(X)
    for names in (None, ["logits"]):
        (output,) = session.run_with_ort_values(names, {"image": value})
        np.testing.assert_array_equal(output.numpy(), expected)
    with pytest.raises(RunInputError, match=r"type ndarray: give an onnxruntime\.OrtValue"):
        session.run_with_ort_values(None, {"image": X})


def test_bound_inputs_are_read_in_place_at_every_run(session, expected):
    binding, image = session.io_binding(), np.zeros_like(X)
    binding.bind_cpu_input("image", image)
    binding.bind_output("logits")
    session.run_with_iobinding(binding)
    (zeros,) = binding.copy_outputs_to_cpu()
    image[:] = X
    session.run_with_iobinding(binding, ort.RunOptions())
    np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], expected)
    np.testing.assert_array_equal(binding.get_outputs()[0].numpy(), expected)
    assert not np.array_equal(zeros, expected)


@pytest.mark.parametrize("kind", ["address", "OrtValue"])
def test_bound_outputs_are_written_in_place(session, expected, kind):
    binding, image = session.io_binding(), X.copy()
    value = ort.OrtValue.ortvalue_from_shape_and_type((2, 10), np.float32)
    if kind == "OrtValue":
        binding.bind_ortvalue_input("image", ort.OrtValue.ortvalue_from_numpy(image))
        binding.bind_ortvalue_output("logits", value)
    else:
        binding.bind_input("image", "cpu", 0, np.float32, X.shape, image.ctypes.data)
        binding.bind_output("logits", "cpu", 0, 1, (2, 10), value.data_ptr())
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(value.numpy(), expected)
    held = binding.copy_outputs_to_cpu()[0]
    image *= 0.5
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(held, expected)
    assert not np.array_equal(value.numpy(), expected)


def test_bindings_that_do_not_fit_are_told(session):
    binding = session.io_binding()
    with pytest.raises(RunInputError, match=r"no input 'x', it has \['image'\]"):
        binding.bind_cpu_input("x", X)
    with pytest.raises(RunInputError, match=r"no output 'x', it has \['logits'\]"):
        binding.bind_output("x")
    with pytest.raises(RequestError, match="memory of device 'cuda'"):
        binding.bind_input("image", "cuda", 0, np.float32, X.shape, 4096)
    with pytest.raises(RequestError, match="give element_type and shape"):
        binding.bind_output("logits", buffer_ptr=4096)
    with pytest.raises(RunInputError, match="element type 16 has no NumPy type"):
        binding.bind_output("logits", "cpu", 0, 16, (2, 10), 4096)
    binding.bind_cpu_input("image", X)
    with pytest.raises(RunInputError, match="no output is bound"):
        session.run_with_iobinding(binding)
    small = np.empty((1, 10), np.float32)
    binding.bind_output("logits", "cpu", 0, np.float32, small.shape, small.ctypes.data)
    with pytest.raises(RunInputError, match=r"float32 \[2, 10\], .* memory of float32 \[1, 10\]"):
        session.run_with_iobinding(binding)
    with pytest.warns(IgnoredSettingWarning, match="bind_output"):
        binding.bind_output("logits", "cuda")
    session.run_with_iobinding(binding)
    assert binding.copy_outputs_to_cpu()[0].shape == (2, 10)
    binding.clear_binding_inputs()
    with pytest.raises(RunInputError, match="the feed has"):
        session.run_with_iobinding(binding)
    binding.clear_binding_outputs()
    assert binding.get_outputs() == []
    with pytest.raises(RequestError, match=r"give what io_binding\(\) returned"):
        session.run_with_iobinding(None)


# ---- clients that nobody may edit ----


def test_a_patched_onnx_runtime_opens_banks(folder, expected, caplog):
    class_before = ort.InferenceSession
    caplog.set_level(logging.INFO, "bapq_edge")
    with patch_onnxruntime({"model.onnx": folder / "model.bank"}, level=8) as patch:
        for model in (str(folder / "model.onnx"), (folder / "model.onnx").read_bytes()):
            session = class_before(model, providers=["CPUExecutionProvider"])
            assert isinstance(session, Session)
            np.testing.assert_array_equal(session.run(None, {"image": X})[0], expected)
            session.close()
        keyword = class_before(path_or_bytes=folder / "model.onnx", disabled_optimizers=None)
        assert isinstance(keyword, Session)
        keyword.close()
        other = class_before(str(MODEL), None, ["CPUExecutionProvider"])
        assert type(other) is class_before
        patch.undo()
        assert type(class_before(str(folder / "model.onnx"))) is class_before
    assert "opened in place of model.onnx" in caplog.text


def test_a_relative_path_means_every_file_whose_path_ends_so(folder, monkeypatch, tmp_path):
    (tmp_path / "models").mkdir()
    for place in (tmp_path / "models", tmp_path):
        (place / "digits.onnx").write_bytes(MODEL.read_bytes())
    with patch_onnxruntime({"models/digits.onnx": folder / "model.bank"}):
        session = ort.InferenceSession(tmp_path / "models" / "digits.onnx")
        assert isinstance(session, Session)
        session.close()
        assert not isinstance(ort.InferenceSession(tmp_path / "digits.onnx"), Session)
        monkeypatch.chdir(tmp_path / "models")
        assert not isinstance(ort.InferenceSession("digits.onnx"), Session)
    with patch_onnxruntime({tmp_path / "models" / "digits.onnx": folder / "model.bank"}):
        session = ort.InferenceSession("digits.onnx")
        assert isinstance(session, Session)
        session.close()


def test_the_last_patch_decides(folder, tmp_path):
    other = chain_bank(tmp_path / "other.bank")
    with (
        patch_onnxruntime({"model.onnx": folder / "model.bank"}),
        patch_onnxruntime({"model.onnx": other}),
    ):
        session = ort.InferenceSession(folder / "model.onnx")
        assert session.get_inputs()[0].name == "x"
        session.close()


def test_a_class_that_inherits_stays_and_is_told(folder):
    class Own(ort.InferenceSession):
        pass

    with patch_onnxruntime({"model.onnx": folder / "model.bank"}):
        with pytest.warns(IgnoredSettingWarning, match="patch_onnxruntime for Own"):
            own = Own(str(folder / "model.onnx"))
        assert isinstance(own, Own)


def test_wrong_patches_are_told(tmp_path):
    with pytest.raises(BankNotFoundError):
        patch_onnxruntime({"model.onnx": tmp_path / "absent.bank"})
    with pytest.raises(RequestError, match="give a dict of models and their banks"):
        bapq_edge.patch_onnxruntime(["model.onnx"])
    with pytest.raises(RequestError, match="not the paths of model and bank"):
        bapq_edge.patch_onnxruntime({"model.onnx": 5})
