"""The driver: what it refuses before it works, what it leaves behind, what it reports."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

import bapq_tools
from bapq_edge import Session
from bapq_edge.bank.codes import dequantize
from bapq_edge.bank.layout import LEVELS
from bapq_edge.bank.reader import Bank
from bapq_edge.bank.verify import verify
from bapq_edge.cli import main
from bapq_edge.errors import (
    BankFormatError,
    CalibrationArrayError,
    CalibrationError,
    CalibrationShapeError,
    CalibrationValueError,
    InputFileError,
    MissingExtraError,
    ModelFormatError,
    NoHeavyLayerError,
    RecipeError,
    RequestError,
    StorageError,
    UncalibratedWarning,
    UnknownLevelError,
)
from bapq_tools import build as driver
from bapq_tools import build_bank
from bapq_tools.build import BuildReport
from support import onnx_models as models
from support.onnx_models import FLOAT, weights

node = helper.make_node


def mlp(rows: int = 64):
    """x (n, 32) -> MatMul, Add, Relu -> MatMul without a bias -> y."""
    return models.model(
        [
            node("MatMul", ["x", "w"], ["h"], "first"),
            node("Add", ["h", "b"], ["s"]),
            node("Relu", ["s"], ["r"]),
            node("MatMul", ["r", "v"], ["y"], "second"),
        ],
        {"x": (FLOAT, ["n", 32])},
        {"y": (FLOAT, ["n", 48])},
        {"w": weights(32, rows), "b": weights(rows), "v": weights(rows, 48)},
    )


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "mlp.onnx"
    path.write_bytes(mlp().SerializeToString())
    return path


@pytest.fixture
def samples():
    return {"x": weights(20, 32)}


def content(bank: Path | BuildReport) -> dict[str, bytes]:
    path = Path(bank)
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_path_and_model_give_the_same_planes(model_file, samples, tmp_path):
    from_file = build_bank(
        str(model_file), tmp_path / "a.bank", calibration=samples, progress=False
    )
    from_model = build_bank(mlp(), tmp_path / "b.bank", calibration=samples, progress=False)
    assert Path(from_file) == tmp_path / "a.bank"
    one, two = Bank.open(from_file).manifest, Bank.open(from_model).manifest
    assert one.planes == two.planes and one.layers == two.layers and one.graph == two.graph
    assert one.model.name == "mlp.onnx" and two.model.name == "test"
    assert one.model.bytes == model_file.stat().st_size
    assert one.calibration.samples == 20
    assert verify(from_file).ok and verify(from_model).ok


def test_layer_without_bias_gets_one_that_the_graph_applies(samples, tmp_path):
    """Relu makes the second layer's inputs positive on average: its error has a mean."""
    manifest = Bank.open(
        build_bank(mlp(), tmp_path / "a.bank", calibration=samples, progress=False)
    ).manifest
    assert [layer.has_bias for layer in manifest.layers] == [True, True]
    graph = models.onnx.load_model(tmp_path / "a.bank" / manifest.graph.file).graph
    used = [a.i for n in graph.node for a in n.attribute if a.name == "use_bias"]
    assert used == [1, 1]


def test_a_depthwise_convolution_is_calibrated_and_answers_as_the_model(tmp_path):
    channels = 48
    model = models.model(
        [
            node("Conv", ["x", "w", "b"], ["c"], "spread", group=channels, pads=[1, 1, 1, 1]),
            node("Relu", ["c"], ["r"]),
            node("Conv", ["r", "v"], ["y"], "mix"),
        ],
        {"x": (FLOAT, ["n", channels, 9, 9])},
        {"y": (FLOAT, ["n", 32, 9, 9])},
        {
            "w": weights(channels, 1, 3, 3),
            "b": weights(channels),
            "v": weights(32, channels, 1, 1),
        },
    )
    x = np.random.default_rng(0).standard_normal((24, channels, 9, 9)).astype(np.float32)
    options = {"calibration": {"x": x}, "levels": LEVELS, "progress": False}
    report = build_bank(model, tmp_path / "a.bank", **options)
    manifest = Bank.open(report).manifest
    assert [layer.operators for layer in manifest.layers] == [("DepthwiseConv",), ("Conv",)]
    assert manifest.kept_in_float == ()
    assert verify(report).ok
    (expected,) = models.run(model, {"x": x[:2]})
    with Session(report) as session:
        for level, most in ((32, 1e-6), (8, 0.02), (4, 0.2), (2, 0.5)):
            session.set_level(level)
            (y,) = session.run(None, {"x": x[:2]})
            assert np.linalg.norm(y - expected) < most * np.linalg.norm(expected)


def test_sensitivity_is_what_a_layer_alone_does_to_the_outputs(tmp_path):
    """Measured on the device: an embedding, whose chunks have 16 rows, and a layer in one chunk."""
    words, dense = weights(100, 32), weights(32, 40)
    model = models.model(
        [node("Gather", ["words", "ids"], ["e"]), node("MatMul", ["e", "w"], ["y"])],
        {"ids": (models.INT64, ["n"])},
        {"y": (FLOAT, ["n", 40])},
        {"words": words, "w": dense},
    )
    ids = np.random.default_rng(0).integers(0, 60, 64)
    path = build_bank(
        model, tmp_path / "a.bank", calibration={"ids": ids}, levels=LEVELS, progress=False
    )
    bank = Bank.open(path)
    found = bank.sensitivity()
    first, second = bank.manifest.layers
    assert (first.chunk_count, second.chunk_count) == (7, 1)
    judged = ids[::2]  # 32 samples, evenly spread
    exact = words[judged] @ dense
    for column, level in enumerate(LEVELS):
        codes = bank.layer_codes(first)
        rows = dequantize(codes, level, first.residual_steps, first.scale_columns)
        error = rows[judged] @ dense - exact
        ratio = (np.square(error).sum(1) / np.square(exact).sum(1)).mean()
        total = found[:7, column].sum(dtype=np.float64)
        assert total == pytest.approx(ratio, rel=0.35 if level == 8 else 1e-3)
    # rows that were never read count a little, as a later application may read them
    assert (found[:, 2:] > 0).all()
    assert found[5, 3] < found[:3, 3].min()


def test_levels_in_any_order_and_form(samples, tmp_path):
    path = build_bank(
        mlp(), tmp_path / "a.bank", calibration=samples, levels=(n for n in (1, 8, 1))
    )
    manifest = Bank.open(path).manifest
    assert manifest.levels == (8, 1)
    assert set(manifest.planes) == {"p4", "r8", "s1"}


@pytest.mark.parametrize("levels", [(), (3,), (8, 16), ("8",), (True,), (8, -1), (4.5,)])
def test_unknown_level(model_file, tmp_path, levels):
    with pytest.raises(UnknownLevelError, match="32, 8, 4, 2, 1"):
        build_bank(model_file, tmp_path / "a.bank", levels=levels)


def test_without_calibration_there_is_a_warning(model_file, tmp_path):
    with pytest.warns(UncalibratedWarning, match=r"a\.bank") as caught:
        build_bank(model_file, tmp_path / "a.bank", progress=False)
    assert caught[0].filename == __file__
    assert Bank.open(tmp_path / "a.bank").manifest.calibration is None
    build_bank(model_file, tmp_path / "float.bank", levels=(32,), progress=False)  # no warning


def test_a_new_bank_replaces_the_old_one(model_file, samples, tmp_path):
    out = build_bank(
        model_file, tmp_path / "a.bank", calibration=samples, levels=(4,), progress=False
    )
    build_bank(model_file, out, calibration=samples, levels=(2,), progress=False)
    assert Bank.open(out).manifest.levels == (2,)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bank", "mlp.onnx"]


def refusals(tmp_path):
    """(error, model, calibration): a failure in every stage before the bank is written."""
    text = tmp_path / "text.onnx"
    text.write_text("not a model")
    nan = np.full((2, 32), np.nan, np.float32)
    light = models.model(
        [node("Relu", ["x"], ["y"])], {"x": (FLOAT, ["n", 32])}, {"y": (FLOAT, None)}
    )
    return [
        (ModelFormatError, text, None),
        (InputFileError, tmp_path / "absent.onnx", None),
        (NoHeavyLayerError, light, None),
        (CalibrationArrayError, mlp(), {}),
        (CalibrationShapeError, mlp(), {"x": np.ones((2, 31), np.float32)}),
        (CalibrationValueError, mlp(), {"x": nan}),
        (CalibrationError, mlp(), text),
    ]


@pytest.mark.filterwarnings("ignore::bapq_edge.errors.UncalibratedWarning")
def test_a_failed_build_leaves_the_old_bank_and_nothing_else(model_file, samples, tmp_path):
    folder = tmp_path / "banks"
    folder.mkdir()
    out = build_bank(model_file, folder / "a.bank", calibration=samples, progress=False)
    before = content(out)
    for error, model, calibration in refusals(tmp_path):
        with pytest.raises(error) as caught:
            build_bank(model, out, calibration=calibration, progress=False)
        assert "\n" not in str(caught.value)
        assert content(out) == before
        assert [p.name for p in folder.iterdir()] == ["a.bank"]


def test_what_is_no_bank_is_never_replaced(samples, tmp_path):
    directory, file = tmp_path / "directory", tmp_path / "file"
    directory.mkdir()
    (directory / "letter.txt").write_text("dear")
    file.write_text("dear")
    for out in (directory, file):
        # The model is not even looked for.
        with pytest.raises(BankFormatError):
            build_bank(tmp_path / "absent.onnx", out, calibration=samples, progress=False)
    assert (directory / "letter.txt").read_text() == file.read_text() == "dear"
    with pytest.raises(StorageError, match="no directory"):
        build_bank(tmp_path / "absent.onnx", tmp_path / "no" / "a.bank", calibration=samples)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 5}, ModelFormatError, "the model is of type int: give an .onnx file"),
        ({"out": 5}, RequestError, "out is 5: give the path"),
        ({"calibration": 5}, CalibrationError, "of type int: give an .npz file"),
        ({"calibration": np.ones((2, 32))}, CalibrationError, "of type ndarray"),
        ({"recipe": 5}, RecipeError, "the recipe is 5: give a YAML file"),
        ({"recipe": "absent.yaml"}, InputFileError, "absent.yaml cannot be read"),
        ({"calibration": "absent.npz"}, InputFileError, "absent.npz cannot be read"),
        ({"levels": 7}, UnknownLevelError, "level 7 was asked for"),
        ({"levels": [8.0]}, UnknownLevelError, "level 8.0 was asked for"),
        ({"workers": "2"}, RequestError, "workers is '2': give a whole number from 1 on"),
        ({"workers": 0}, RequestError, "workers is 0"),
    ],
)
def test_arguments_of_no_use_are_told_before_the_work(
    tmp_path, monkeypatch, samples, arguments, error, message
):
    monkeypatch.setattr(driver, "load_model", lambda *_: pytest.fail("worked in vain"))
    usual = {"model": mlp(), "out": tmp_path / "a.bank", "calibration": samples}
    with pytest.raises(error, match=message) as caught:
        build_bank(**{**usual, **arguments}, progress=False)
    assert "\n" not in str(caught.value)


def test_too_small_a_disk_is_found_before_the_work(model_file, samples, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    real = shutil.disk_usage
    here = tmp_path / "disk"
    here.mkdir()
    monkeypatch.setattr(
        shutil, "disk_usage", lambda p: usage(9, 9, 5000) if Path(p) == here else real(p)
    )
    monkeypatch.setattr(driver, "quantize_layers", lambda *_: pytest.fail("worked in vain"))
    with pytest.raises(StorageError, match=r"needs about \d+ bytes, its disk has 5000 free"):
        build_bank(model_file, here / "a.bank", calibration=samples, progress=False)
    assert not list(here.iterdir())


def test_estimate_is_above_the_banks_size_and_near(tmp_path, samples, monkeypatch):
    model = mlp(3000)
    usage = namedtuple("usage", "total used free")
    size = sum(
        map(len, content(build_bank(model, tmp_path / "a.bank", calibration=samples)).values())
    )
    real = shutil.disk_usage
    for free, fits in ((size, False), (size + (2 << 20), True)):

        def disk(path, free=free):
            return usage(0, 0, free) if Path(path) == tmp_path else real(path)

        monkeypatch.setattr(shutil, "disk_usage", disk)
        if fits:
            build_bank(model, tmp_path / "a.bank", calibration=samples)
        else:
            with pytest.raises(StorageError):
                build_bank(model, tmp_path / "a.bank", calibration=samples)


# ---- the command ----


def test_command_builds_and_reports(model_file, samples, tmp_path, capsys):
    np.savez(tmp_path / "data.npz", **samples)
    out = tmp_path / "a.bank"
    command = ["build", str(model_file), "-o", str(out), "--workers", "2"]
    assert main([*command, "--calibration", str(tmp_path / "data.npz"), "--levels", "4,2"]) == 0
    printed = capsys.readouterr()
    assert "5,120 weights in 2 layers, 20 calibration samples" in printed.out
    assert "at level 4" in printed.out and "m1" in printed.out
    stages = [line.partition(":")[0] for line in printed.err.splitlines()]
    assert stages == ["import", "fold", "layers", "quantize", "write"]
    assert Bank.open(out).manifest.levels == (4, 2)

    assert main([*command, "--quiet", "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["weights"] == 5120 and report["calibration_samples"] == 0
    assert set(report["plane_bytes"]) == {"p4", "r8", "s1", "m1"}
    assert "without calibration data" in printed.err and len(printed.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--levels", "8,x"], UnknownLevelError.exit_code),
        (["--levels", "7"], UnknownLevelError.exit_code),
        (["--calibration", "absent.npz"], InputFileError.exit_code),
    ],
)
def test_command_fails_in_one_line(model_file, tmp_path, capsys, arguments, code):
    out = tmp_path / "a.bank"
    assert main(["build", str(model_file), "-o", str(out), "--quiet", *arguments]) == code
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not out.exists()


def test_without_the_host_packages_the_extra_is_named(model_file, tmp_path):
    """The command line starts without them; only building asks for them."""
    script = (
        "import sys; sys.modules['onnx'] = None\n"
        "from bapq_edge.cli import main\n"
        f"code = main(['build', {str(model_file)!r}, '-o', {str(tmp_path / 'a.bank')!r}])\n"
        "import bapq_tools\n"
        "try: bapq_tools.build_bank\n"
        "except ImportError as error: print(type(error).__name__)\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == MissingExtraError.exit_code
    assert done.stderr == (
        "bapq: building a bank needs onnx, which is not installed: pip install 'bapq-edge[host]'\n"
    )
    assert done.stdout == "MissingExtraError\n"


def test_public_names():
    assert sorted(bapq_tools.__all__) == ["__version__", "build_bank", "fit"]
    with pytest.raises(AttributeError, match="nothing"):
        bapq_tools.nothing  # noqa: B018
