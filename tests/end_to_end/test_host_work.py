"""Builds on several processes or machines, and builds that are stopped and go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from onnx import helper

from bapq_edge.bank.verify import verify
from bapq_edge.cli import main
from bapq_edge.errors import (
    CalibrationError,
    ClusterError,
    MissingExtraError,
    StorageError,
    WorkerError,
)
from bapq_tools import build as driver
from bapq_tools import build_bank
from bapq_tools.build import BuildReport
from bapq_tools.build_support import workers
from bapq_tools.build_support.workers import Workers
from bapq_tools.quantize import checkpoint, sequential
from support import onnx_models as models
from support.onnx_models import FLOAT, weights

LAYERS = 6


@pytest.fixture
def samples():
    return {"x": weights(40, 64)}


def chain(width: int = 64):
    """Fully connected layers, each on the one before: as many stages."""
    names = ["x", *(f"h{i}" for i in range(1, LAYERS)), "y"]
    nodes = [
        step
        for i in range(LAYERS)
        for step in (
            helper.make_node("MatMul", [names[i], f"w{i}"], [f"s{i}"], f"layer{i}"),
            helper.make_node("Tanh", [f"s{i}"], [names[i + 1]]),
        )
    ]
    constants = {f"w{i}": weights(width, width, seed=i) / 8 for i in range(LAYERS)}
    ends = {"x": (FLOAT, ["n", width])}, {"y": (FLOAT, ["n", width])}
    return models.model(nodes, *ends, constants)


def content(bank: Path | BuildReport) -> dict[str, bytes]:
    path = Path(bank)
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture
def everything_is_worth_a_process(monkeypatch):
    monkeypatch.setattr(workers, "_WORTH_PROCESSES_S", 0)


def children() -> set[int]:
    # The resource tracker serves the whole life of this process.
    return {
        child.pid
        for child in psutil.Process().children(recursive=True)
        if "resource_tracker" not in " ".join(child.cmdline())
    }


# ---- processes ----


def _process(value: int) -> tuple[int, int]:
    return value, os.getpid()


def _blas_threads(_: int) -> set[int]:
    from threadpoolctl import threadpool_info

    return {pool["num_threads"] for pool in threadpool_info()}


def _total(array: np.ndarray) -> float:
    return float(array.sum())


def _refuse(value: int) -> int:
    raise CalibrationError(f"sample {value} is bad")


def _die(value: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return value


@pytest.mark.usefixtures("everything_is_worth_a_process")
def test_results_come_in_order_from_processes_that_end(tmp_path):
    before = children()
    with Workers(2, folder=tmp_path) as pool:
        found = list(pool.map(_process, [(n,) for n in range(20)], 1))
        again = list(pool.map(_process, [(n,) for n in range(20)], 1))
        assert list(pool.map(_total, [(np.ones((600, 600)),)] * 3, 1)) == [360000.0] * 3
        assert list(pool.map(_blas_threads, [(0,)] * 3, 1)) == [{1}] * 3
        assert list(pool.map(_process, [(0,)], 1)) == [(0, os.getpid())]
    assert [value for value, _ in found] == list(range(20))
    used = {pid for _, pid in found + again}
    assert os.getpid() not in used and len(used) <= 2
    assert children() == before and not list(tmp_path.iterdir())


@pytest.mark.usefixtures("everything_is_worth_a_process")
def test_errors_of_workers_are_our_own(tmp_path):
    bad = pytest.raises(CalibrationError, match=r"sample \d is bad")
    with bad, Workers(2, folder=tmp_path) as pool:
        list(pool.map(_refuse, [(n,) for n in range(4)], 1))
    lost = pytest.raises(WorkerError, match="fewer --workers")
    with lost as caught, Workers(2, folder=tmp_path) as pool:
        list(pool.map(_die, [(n,) for n in range(4)], 1))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("everything_is_worth_a_process")
def test_bank_does_not_depend_on_the_number_of_workers(samples, tmp_path):
    banks = []
    for count in (1, 2, 3):
        path = tmp_path / f"{count}.bank"
        build_bank(chain(), path, calibration=samples, workers=count, progress=False)
        banks.append(content(path))
    assert banks[0] == banks[1] == banks[2]
    assert not list(tmp_path.glob("*partial*"))


# ---- a Dask cluster ----


@pytest.fixture(scope="module")
def cluster():
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
    ) as local:
        yield local.scheduler_address


@pytest.mark.usefixtures("everything_is_worth_a_process")
def test_cluster_gives_the_same_bank(cluster, samples, tmp_path):
    build_bank(chain(), tmp_path / "here.bank", calibration=samples, workers=1, progress=False)
    build_bank(chain(), tmp_path / "there.bank", calibration=samples, dask=cluster, progress=False)
    assert content(tmp_path / "there.bank") == content(tmp_path / "here.bank")


@pytest.mark.usefixtures("everything_is_worth_a_process")
def test_cluster_works_on_large_arrays_and_answers_in_order(cluster):
    with Workers(1, cluster) as pool:
        found = list(pool.map(_process, [(n,) for n in range(20)], 1))
        large = [(np.full((1200, 1200), n, np.float64),) for n in range(3)]
        assert list(pool.map(_total, large, 1)) == [0, 1440000, 2880000]
        assert list(pool.map(_blas_threads, [(0,)] * 3, 1)) == [{1}] * 3
        with pytest.raises(CalibrationError, match=r"sample \d is bad"):
            list(pool.map(_refuse, [(n,) for n in range(4)], 1))
    assert [value for value, _ in found] == list(range(20))
    assert len({pid for _, pid in found} - {os.getpid()}) == 2


@pytest.mark.usefixtures("everything_is_worth_a_process")
def test_cluster_that_loses_its_workers(tmp_path):
    from distributed import LocalCluster

    options = {"threads_per_worker": 1, "dashboard_address": ":0", "silence_logs": 50}
    failed = pytest.raises(ClusterError, match="finished layers are kept")
    with (
        LocalCluster(n_workers=1, processes=True, **options) as local,
        failed as caught,
        Workers(1, local.scheduler_address) as pool,
    ):
        list(pool.map(_die, [(n,) for n in range(2)], 1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "127.0.0.1:9", "nonsense://a", "a:b:c"])
def test_cluster_that_is_not_there(address, samples, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(workers, "_ANSWER_S", 0.5)
    model = tmp_path / "m.onnx"
    model.write_bytes(chain().SerializeToString())
    np.savez(tmp_path / "data.npz", **samples)
    command = ["build", str(model), "-o", str(tmp_path / "a.bank"), "--quiet", "--dask", address]
    assert main([*command, "--calibration", str(tmp_path / "data.npz")]) == ClusterError.exit_code
    said = capfd.readouterr().err
    assert said.startswith("bapq: the Dask cluster") and address in said
    assert said.count("\n") == 1 and "--dask" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.npz", "m.onnx"]


def test_cluster_of_another_version(cluster, monkeypatch):
    monkeypatch.setattr(workers, "__version__", "9.9")
    refused = pytest.raises(ClusterError, match=r"has bapq-edge \S+, this machine 9\.9")
    with refused, Workers(1, cluster):
        pass


def test_without_distributed(samples, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'bapq-edge\[dask\]'"):
        build_bank(
            chain(), tmp_path / "a.bank", calibration=samples, dask="tcp://x:1", progress=False
        )
    assert not list(tmp_path.iterdir())


# ---- builds that are stopped ----

KILLED = """
import os, signal, sys
import numpy as np
from bapq_tools.build_support import workers
from bapq_tools import build_bank
from bapq_tools.quantize import checkpoint

workers._WORTH_PROCESSES_S = 0
put = checkpoint.Checkpoint.put

def put_and_die(self, index, layer):
    put(self, index, layer)
    if len(self) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.Checkpoint.put = put_and_die
model, out, data = sys.argv[1:]
build_bank(model, out, calibration=data, workers=2)
"""


@pytest.fixture
def killed(samples, tmp_path):
    """A build whose process was killed after three layers; (model, bank, data)."""
    model, data, bank = tmp_path / "m.onnx", tmp_path / "data.npz", tmp_path / "a.bank"
    model.write_bytes(chain().SerializeToString())
    np.savez(data, **samples)
    result = subprocess.run([sys.executable, "-c", KILLED, model, bank, data], capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    folder = bank.with_name("a.bank.bapq-partial")
    assert len(list(folder.glob("layer_*"))) == 3 and not bank.exists()
    return model, bank, data


@pytest.fixture
def quantized(monkeypatch):
    """Names of the layers that a build of this process quantizes, in order."""
    names = []
    real = sequential.layer_tasks

    def spy(layer, *arguments):
        names.append(layer.name)
        return real(layer, *arguments)

    monkeypatch.setattr(sequential, "layer_tasks", spy)
    return names


def whole(killed) -> dict[str, bytes]:
    """The bank of a build that nobody disturbs."""
    model, bank, data = killed
    return content(
        build_bank(model, bank.with_name("whole.bank"), calibration=data, progress=False)
    )


def names_beside(bank: Path) -> list[str]:
    return sorted(path.name for path in bank.parent.iterdir())


def test_killed_build_goes_on_where_it_was(killed, quantized, capfd):
    model, bank, data = killed
    build_bank(model, bank, calibration=data, workers=1)
    assert quantized == ["layer3", "layer4", "layer5"]
    said = capfd.readouterr().err
    assert "going on from 3 quantized layers" in said and said.count("bapq: ") == 1
    assert names_beside(bank) == ["a.bank", "data.npz", "m.onnx"]
    assert content(bank) == whole(killed) and verify(bank).ok


@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit", "swapped"])
def test_damaged_layer_is_quantized_again(killed, quantized, damage):
    model, bank, data = killed
    first, second, _ = sorted(bank.with_name("a.bank.bapq-partial").glob("layer_*"))
    found = bytearray(second.read_bytes())
    if damage == "swapped":
        found = bytearray(first.read_bytes())
    elif damage == "one bit":
        found[len(found) // 3] ^= 1
    else:
        del found[len(found) // 2 if damage == "truncated" else 0 :]
    second.write_bytes(found)
    build_bank(model, bank, calibration=data, progress=False)
    assert quantized == ["layer1", "layer3", "layer4", "layer5"]
    assert content(bank) == whole(killed)


@pytest.mark.parametrize("other", ["weights", "data", "levels", "recipe", "version"])
def test_another_build_does_not_go_on_from_it(killed, quantized, other, monkeypatch):
    model, bank, data = killed
    options = {}
    if other == "weights":
        # As an exporter that keeps weights beside the model: the .onnx itself would not change.
        changed = models.onnx.load_model(model)
        values = models.numpy_helper.to_array(changed.graph.initializer[5]).copy()
        values[0, 0] += 1
        changed.graph.initializer[5].CopyFrom(models.numpy_helper.from_array(values, "w5"))
        model.write_bytes(changed.SerializeToString())
    elif other == "data":
        np.savez(data, x=weights(40, 64, seed=1))
    elif other == "levels":
        options["levels"] = (8, 4)
    elif other == "recipe":
        options["recipe"] = {"layers": {"layer5": {"scale_columns": {2: 32}}}}
    else:
        monkeypatch.setattr(driver, "__version__", "9.9")
    build_bank(model, bank, calibration=data, progress=False, **options)
    assert quantized == [f"layer{i}" for i in range(LAYERS)]
    assert names_beside(bank) == ["a.bank", "data.npz", "m.onnx"]
    assert verify(bank).ok


def test_weights_beside_the_model_count_too(samples, tmp_path, quantized, monkeypatch):
    """Two models whose .onnx files are the same bytes."""
    stopped = KeyboardInterrupt()

    def interrupt(self, index, layer, put=checkpoint.Checkpoint.put):
        put(self, index, layer)
        raise stopped

    out = tmp_path / "a.bank"
    for seed in (0, 1):
        model = chain()
        first = models.numpy_helper.from_array(weights(64, 64, seed=seed), "w0")
        model.graph.initializer[0].CopyFrom(first)
        models.onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin")
        with monkeypatch.context() as patch:
            if seed == 0:
                patch.setattr(checkpoint.Checkpoint, "put", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    build_bank(tmp_path / "m.onnx", out, calibration=samples, progress=False)
            else:
                build_bank(tmp_path / "m.onnx", out, calibration=samples, progress=False)
        (tmp_path / "w.bin").unlink()
    assert quantized == ["layer0", *(f"layer{i}" for i in range(LAYERS))]


@pytest.mark.parametrize(
    ("error", "stays"),
    [(StorageError("full"), True), (KeyboardInterrupt(), True), (CalibrationError("bad"), False)],
)
def test_what_an_error_leaves(samples, tmp_path, quantized, monkeypatch, capfd, error, stays):
    """Layers stay where another try may get further, and only there."""

    def fail(self, index, layer, put=checkpoint.Checkpoint.put):
        if len(self) == 2:
            raise error
        put(self, index, layer)

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(checkpoint.Checkpoint, "put", fail)
        build_bank(chain(), tmp_path / "a.bank", calibration=samples)
    folder = tmp_path / "a.bank.bapq-partial"
    said = capfd.readouterr().err
    assert (f"2 quantized layers stay in {folder}" in said) == stays
    files = sorted(path.name.partition(".")[0] for path in tmp_path.glob("*/*"))
    assert files == (["key", "layer_0", "layer_1"] if stays else [])
    quantized.clear()
    build_bank(chain(), tmp_path / "a.bank", calibration=samples, progress=False)
    assert quantized == [f"layer{i}" for i in range(2 if stays else 0, LAYERS)]
    assert names_beside(tmp_path / "a.bank") == ["a.bank"]


def test_two_builds_of_one_name_do_not_mix(samples, tmp_path):
    with checkpoint.Checkpoint(tmp_path / "a.bank", {}):
        with pytest.raises(StorageError, match="another program is building there"):
            build_bank(chain(), tmp_path / "a.bank", calibration=samples, progress=False)
        assert (tmp_path / "a.bank.bapq-partial" / "scratch").is_dir()


def test_killed_build_leaves_no_process(samples, tmp_path):
    model, data = tmp_path / "m.onnx", tmp_path / "data.npz"
    model.write_bytes(chain().SerializeToString())
    np.savez(data, **samples)
    mark = {"BAPQ_TEST_MARK": str(tmp_path)}
    command = [sys.executable, "-c", KILLED, model, tmp_path / "a.bank", data]
    subprocess.run(command, env={**os.environ, **mark}, capture_output=True)

    def orphans() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("BAPQ_TEST_MARK") == str(tmp_path):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    _, alive = psutil.wait_procs(orphans(), timeout=10)
    assert not alive
