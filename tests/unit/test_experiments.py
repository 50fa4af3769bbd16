"""The experiments: CIFAR-10's own format, the networks, what becomes of the results."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import os
import pickle

import numpy as np
import onnx
import onnxruntime
import pytest

from bapq_edge import Session
from bapq_edge.errors import InputFileError
from experiments.cnn_training import _gradients, _start, train_cnn
from experiments.datasets import load_cifar10, read_checksums
from experiments.networks import cnn_to_onnx, synthetic_mlp
from experiments.pruning import prune_loaded
from experiments.results import in_own_process, summary_path, write_results
from experiments.switching import Task, measure_level, trace_rows
from support.streaming import matrix_bank


def write_batch(path, images, labels, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (images, 3072)).astype(np.uint8)
    batch = {b"batch_label": b"one", b"data": pixels, b"labels": list(labels)}
    path.write_bytes(pickle.dumps(batch, protocol=2))
    return pixels


@pytest.fixture
def cifar(tmp_path):
    """(folder, checksums, pixels of the test batch) of a tiny data set in CIFAR-10's format."""
    write_batch(tmp_path / "data_batch_1", 30, [i % 10 for i in range(30)], 1)
    write_batch(tmp_path / "data_batch_2", 20, [i % 10 for i in range(20)], 2)
    pixels = write_batch(tmp_path / "test_batch", 10, range(10), 3)
    checksums = {
        path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()
    }
    return tmp_path, checksums, pixels


def test_cifar10_is_read_in_its_own_format(cifar):
    folder, checksums, pixels = cifar
    images = load_cifar10(folder, checksums)
    assert images.x_train.shape == (49, 3, 32, 32)
    assert len(images.x_calibration) == 1
    assert images.y_test.tolist() == list(range(10))
    x = np.concatenate([images.x_train, images.x_calibration])
    np.testing.assert_allclose(x.mean((0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(x.std((0, 2, 3)), 1, atol=1e-4)
    # Red, then green, then blue, each by rows: the scaling keeps the order of a channel's pixels.
    order = pixels[0].reshape(3, 32, 32)[1].argsort(axis=None, kind="stable")
    assert (np.diff(images.x_test[0, 1].ravel()[order]) >= 0).all()


def test_the_archives_folder_is_found_in_the_one_that_is_named(cifar, tmp_path_factory):
    folder, checksums, _ = cifar
    above = tmp_path_factory.mktemp("above")
    os.symlink(folder, above / "cifar-10-batches-py")
    assert len(load_cifar10(above, checksums).x_test) == 10


def test_a_missing_file_says_where_to_get_it(tmp_path):
    with pytest.raises(
        InputFileError, match=r"data_batch_1 is not there: get https://www\.cs\.tor"
    ):
        load_cifar10(tmp_path)


def test_a_changed_file_is_refused_before_it_is_unpickled(cifar):
    folder, checksums, _ = cifar
    (folder / "test_batch").write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(InputFileError, match="published is"):
        load_cifar10(folder, checksums)


def test_a_batch_makes_nothing_but_arrays(cifar):
    folder, checksums, _ = cifar
    content = pickle.dumps({b"data": os.getcwd, b"labels": []}, protocol=2)
    (folder / "test_batch").write_bytes(content)
    checksums["test_batch"] = hashlib.md5(content).hexdigest()
    with pytest.raises(InputFileError, match="it wants"):
        load_cifar10(folder, checksums)


def test_checksums_are_read_as_md5sum_prints_them(tmp_path):
    (tmp_path / "sums").write_text("aa  data_batch_1\nbb *test_batch\n")
    assert read_checksums(tmp_path / "sums") == {"data_batch_1": "aa", "test_batch": "bb"}
    (tmp_path / "sums").write_text("aa  else\n")
    with pytest.raises(InputFileError, match="test_batch"):
        read_checksums(tmp_path / "sums")


def test_the_training_follows_the_gradient():
    """Beside differences of the loss, which the exported network gives."""
    random = np.random.default_rng(0)
    images = random.standard_normal((4, 1, 8, 8)).astype(np.float32)
    labels = np.array([0, 1, 2, 1])
    parameters = _start(random, (8, 8, 1), 3)

    def loss():
        logits = run(cnn_to_onnx(parameters, (1, 8, 8)), images).astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        return -np.mean(logits[range(4), labels] - np.log(np.exp(logits).sum(1)))

    gradients = _gradients(parameters, images.transpose(0, 2, 3, 1), labels)
    for name, value in parameters.items():
        way = np.sign(gradients[name]).astype(np.float32)
        start, step = value.copy(), np.float32(2e-4)
        parameters[name] = start + step * way
        above = loss()
        parameters[name] = start - step * way
        slope = (above - loss()) / (2 * float(step))
        parameters[name] = start
        assert slope == pytest.approx(np.abs(gradients[name]).sum(), rel=0.03), name


def run(model: onnx.ModelProto, images):
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def test_the_cnn_learns_what_can_be_learned():
    random = np.random.default_rng(0)
    labels = np.arange(64) % 2
    images = random.standard_normal((64, 1, 8, 8)).astype(np.float32)
    images[:, :, :4] += 3 * labels[:, None, None, None]
    parameters = train_cnn(images, labels, seed=1, epochs=5, batch_size=16)
    assert (run(cnn_to_onnx(parameters, (1, 8, 8)), images).argmax(1) == labels).mean() > 0.95
    again = train_cnn(images, labels, seed=1, epochs=5, batch_size=16)
    assert all((again[name] == value).all() for name, value in parameters.items())


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.3])
def test_of_uniform_weights_one_less_the_threshold_stays(threshold):
    kept, weights = prune_loaded(synthetic_mlp("uniform", seed=1), threshold)
    assert kept / weights == pytest.approx(1 - threshold, abs=0.005)


def test_of_normal_weights_far_fewer_stay():
    kept, weights = prune_loaded(synthetic_mlp("normal", seed=1), 0.2)
    assert 0.3 < kept / weights < 0.45


def test_results_and_summary_are_written(tmp_path):
    rows = [
        {"run": 1, "time_s": 1.0, "energy_j": None, "level": "8"},
        {"run": 2, "time_s": 3.0, "energy_j": None, "level": "8"},
        {"run": 1, "time_s": 5.0, "energy_j": None, "level": "4"},
    ]
    write_results(rows, ["level"], tmp_path / "r.csv")
    assert (tmp_path / "r.csv").read_text().startswith("run,time_s,energy_j,level\n1,1.0,,8\n")
    with open(summary_path(tmp_path / "r.csv")) as file:
        eight, four = csv.DictReader(file)
    assert (eight["runs"], eight["time_s_mean"], eight["energy_j_mean"]) == ("2", "2.0", "")
    assert float(eight["time_s_sd"]) == pytest.approx(2**0.5)
    assert four["time_s_sd"] == ""


def test_memory_is_the_sessions_and_not_that_of_judging_it(tmp_path):
    """Answers of 50 MiB, kept or put together, would be in the peak of every later step."""
    bank = matrix_bank(tmp_path / "m.bank", 4096, 64, (8, 4))
    random = np.random.default_rng(0)
    feeds = [{"x": random.standard_normal((16, 64)).astype(np.float32)} for _ in range(200)]
    task = Task(tmp_path / "none.onnx", bank, {"x": feeds[0]["x"][:1]}, feeds, "y")
    with Session(bank, level=8) as session:
        np.save(tmp_path / "expected.npy", np.concatenate([*task.answers(session)]))
    assert (tmp_path / "expected.npy").stat().st_size > 50 << 20
    task = dataclasses.replace(task, expected=tmp_path / "expected.npy")
    level = in_own_process(measure_level, task, "8")
    trace = in_own_process(trace_rows, task)
    assert level["accuracy"] == pytest.approx(1) and 0.9 < trace[-1]["accuracy"] <= 1.0001
    peaks = [level["peak_bytes"], *(row["peak_bytes"] for row in trace)]
    assert min(peaks) > 1 << 20 and max(peaks) < 25 << 20, peaks
