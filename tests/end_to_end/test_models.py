"""Real models, built and run at every level, against ONNX Runtime in float32."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import bapq_tools
from bapq_edge import Session
from bapq_edge.bank.exchange import pack, unpack
from bapq_edge.bank.layout import LEVELS
from bapq_edge.bank.verify import verify
from bapq_edge.errors import UncalibratedWarning
from benchmarks.zoo import make_model
from benchmarks.zoo.digits import INPUT_NAMES, calibration_npz, split_of
from benchmarks.zoo.light_cnns import LIGHT_CNNS
from benchmarks.zoo.minilm import encode, minilm_dir
from benchmarks.zoo.sentences import load_sentences

SCORES = {"cnn": 0, "mlp": 1, "resnet": 0}  # which output of each digits model
MOST_LOST = {  # right answers of 600 that a level may lose
    "cnn": {8: 0, 4: 1, 2: 3, 1: 6},
    "mlp": {8: 1, 4: 2, 2: 4, 1: 24},
    "resnet": {8: 1, 4: 1, 2: 4, 1: 8},
}
QUICK_TO_CALIBRATE = {"shufflenet", "squeezenet"}
LARGE = {"bvlc_alexnet", "vgg19", "zfnet512"}  # 240 to 575 MB of weights each


def float32_session(model: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])


def relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    difference = value.astype(np.float64) - reference
    return float(np.linalg.norm(difference) / np.linalg.norm(reference.astype(np.float64)))


def outputs_by_level(bank: Path, feed: dict[str, np.ndarray]) -> dict[int, list[np.ndarray]]:
    """The outputs of one live session at every level, back and forth."""
    outputs: dict[int, list[np.ndarray]] = {}
    with Session(bank) as session:
        assert session.stats().level == 32
        for level in (*LEVELS, *reversed(LEVELS)):
            session.set_level(level)
            found = session.run(None, feed)
            for value, before in zip(found, outputs.setdefault(level, found), strict=True):
                np.testing.assert_array_equal(value, before)
    return outputs


def file_digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.blake2b(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module", params=["digits_cnn", "digits_mlp", "digits_resnet"])
def digits(request, tmp_path_factory):
    """Model, bank, input name and test split of one bundled model."""
    kind = request.param.removeprefix("digits_")
    folder = tmp_path_factory.mktemp(request.param)
    model = folder / "model.onnx"
    make_model(request.param, model)
    calibration_npz(folder / "calibration.npz", kind)
    bank = Path(
        bapq_tools.build_bank(
            model,
            folder / "digits.bank",
            calibration=folder / "calibration.npz",
            levels=LEVELS,
            progress=False,
        )
    )
    return kind, model, bank, split_of(kind)


def classes(kind: str, outputs: list[np.ndarray]) -> np.ndarray:
    return outputs[SCORES[kind]].argmax(axis=1)


def test_digits_keep_their_accuracy(digits):
    kind, model, bank, split = digits
    feed = {INPUT_NAMES[kind]: split.x_test}
    reference = float32_session(model).run(None, feed)
    right = {"fp32": int((classes(kind, reference) == split.y_test).sum())}
    outputs = outputs_by_level(bank, feed)
    for level, found in outputs.items():
        right[level] = int((classes(kind, found) == split.y_test).sum())
    assert relative_error(outputs[32][SCORES[kind]], reference[SCORES[kind]]) < 1e-4
    assert len(split.y_test) == 600
    assert right[32] == right["fp32"]
    assert all(right["fp32"] - right[level] <= most for level, most in MOST_LOST[kind].items())


def test_unpack_then_pack_gives_back_the_same_bank(digits, tmp_path):
    _, _, bank, _ = digits
    tree = unpack(bank, tmp_path / "tree")
    arrays = sorted(tmp_path.rglob("chunk_*_q*.npy"))
    assert {path.stem.rpartition("_q")[2] for path in arrays} == {"32", "8", "4", "2", "1"}
    for path in arrays[:3]:
        assert len(np.load(path)) > 0
    again = pack(tree, tmp_path / "again.bank")
    assert file_digests(again) == file_digests(bank)
    assert verify(again).ok


def test_two_builds_give_the_same_bank(digits, tmp_path):
    kind, model, bank, _ = digits
    calibration_npz(tmp_path / "calibration.npz", kind)
    again = Path(
        bapq_tools.build_bank(
            model,
            tmp_path / "again.bank",
            calibration=tmp_path / "calibration.npz",
            levels=LEVELS,
            workers=1,
            progress=False,
        )
    )
    assert file_digests(again) == file_digests(bank)


def test_minilm_keeps_its_embeddings(tmp_path):
    model = tmp_path / "minilm.onnx"
    make_model("minilm", model)
    calibration, held_out = load_sentences()
    bank = Path(
        bapq_tools.build_bank(
            model,
            tmp_path / "minilm.bank",
            calibration=encode(calibration[:96], minilm_dir()),
            levels=LEVELS,
            progress=False,
        )
    )
    feed = encode(held_out[:100], minilm_dir())
    names = [value.name for value in float32_session(model).get_outputs()]
    at = names.index("sentence_embedding")
    reference = float32_session(model).run(None, feed)[at]
    found = {level: outputs[at] for level, outputs in outputs_by_level(bank, feed).items()}
    cosine = {level: float((v * reference).sum(axis=1).mean()) for level, v in found.items()}
    assert relative_error(found[32], reference) < 1e-4
    assert cosine[8] >= 0.999
    assert cosine[4] >= 0.97
    assert cosine[4] > cosine[2] > 0.7 > cosine[1]
    with Session(bank, bits=3.0) as session:
        planned = session.run(None, feed)[at]
    assert float((planned * reference).sum(axis=1).mean()) > 0.94


def before_softmax(shares):
    """The scores that a Softmax made these of, less their mean: behind it the error of a net with
    random weights is that of the one or two classes which take nearly all."""
    if not np.allclose(shares.reshape(len(shares), -1).sum(1), 1, atol=1e-3):
        return shares
    scores = np.log(np.maximum(shares, 1e-30))
    return scores - scores.mean()


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.slow] if x in LARGE else []) for x in LIGHT_CNNS],
)
def test_cnn_architectures_run_at_every_level(name, tmp_path):
    model = tmp_path / "model.onnx"
    make_model(name, model)
    session = float32_session(model)
    (x,) = session.get_inputs()
    rng = np.random.default_rng(0)
    feed = {x.name: rng.standard_normal(x.shape).astype(np.float32)}
    (reference,) = session.run(None, feed)
    calibration = {x.name: rng.standard_normal(x.shape).astype(np.float32)}
    quick = name in QUICK_TO_CALIBRATE
    with contextlib.nullcontext() if quick else pytest.warns(UncalibratedWarning):
        bank = Path(
            bapq_tools.build_bank(
                model,
                tmp_path / "model.bank",
                calibration=calibration if quick else None,
                levels=LEVELS,
                progress=False,
            )
        )
    model.unlink()
    outputs = outputs_by_level(bank, feed)
    wanted = before_softmax(reference)
    errors = {
        level: relative_error(before_softmax(found), wanted) for level, (found,) in outputs.items()
    }
    assert errors[32] < 1e-4
    assert errors[8] < 0.05  # random weights pass on every layer's noise, trained ones damp it
    # Fitted to its one sample, level 4 may come out as near as level 8.
    assert errors[32] < errors[8] < (0.1 if quick else errors[4])
    assert all(np.isfinite(found).all() for (found,) in outputs.values())
