"""The device package stays light, and its wheel is whole."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import bapq_edge
from bapq_edge import errors
from bapq_edge.control.device_profile import load_profile, profile_names
from bapq_edge.units import counted, format_size, parse_size

ROOT = Path(__file__).resolve().parents[2]


def modules_after(statement):
    script = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    return set(result.stdout.split())


@pytest.mark.parametrize("statement", ["import bapq_edge", "import bapq_edge.engine.graph"])
def test_importing_the_device_package_loads_no_host_package(statement):
    host = {"onnx", "sklearn", "scipy", "bapq_tools", "rich", "joblib", "matplotlib"}
    assert not {name.partition(".")[0] for name in modules_after(statement)} & host


def test_importing_the_device_package_loads_only_what_every_session_needs():
    # Each costs a board memory: hashlib with its OpenSSL 3.5 MB, YAML 0.7 MB.
    added = modules_after("import bapq_edge") - modules_after("import numpy, onnxruntime")
    some_need = {"yaml", "csv", "subprocess", "hashlib", "psutil", "bapq_edge.control.controller"}
    some_need |= {"bapq_edge.sensors", "bapq_edge.commands", "bapq_edge.bank.writer"}
    if Path("/proc/device-tree/model").exists():
        some_need.remove("yaml")  # on a board every session does
    assert not added & some_need
    assert "onnxruntime" in modules_after("import bapq_edge")


@pytest.mark.parametrize("chosen", [None, "0"])
def test_onnxruntime_reports_nothing_unless_that_was_chosen(chosen, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # where its database would be
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    if chosen is not None:
        monkeypatch.setenv("ORT_DISABLE_TELEMETRY", chosen)
    script = "import bapq_edge, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert result.stdout.strip() == (chosen or "1")
    assert chosen is not None or not list(tmp_path.iterdir())


def test_every_error_has_an_exit_code_of_its_own_and_a_place_in_the_tree():
    classes = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, (errors.BapqError, errors.BapqWarning))
    ]
    codes = [value.exit_code for value in classes if issubclass(value, errors.BapqError)]
    assert len(set(codes)) == len(codes)
    assert all(0 < code < 126 for code in codes)
    for value in classes:
        assert value.__name__ in errors.__doc__ and value.__doc__


def test_wheel_holds_library_tools_and_profiles(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "bapq_edge/session.py",
        "bapq_edge/engine/libbapq.so",
        "bapq_edge/device_profiles/raspberry_pi_4.yaml",
        "bapq_tools/build.py",
        "bapq_tools/quantize/layer_tasks.py",
    } <= names
    assert not [name for name in names if name.endswith((".c", ".h", ".o"))]
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"bapq_edge", "bapq_tools"}, "benchmarks and the zoo stay at home"
    check_bill_of_materials(zipfile.ZipFile(wheel))


def check_bill_of_materials(archive):
    """It tells the version, and every package that the wheel needs."""
    (name,) = [name for name in archive.namelist() if ".dist-info/sboms/" in name]
    bill = json.loads(archive.read(name))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["version"] == bapq_edge.__version__
    (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    needed = {
        re.match(r"[\w-]+", line.removeprefix("Requires-Dist: "))[0].lower()
        for line in archive.read(metadata).decode().splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    }
    assert needed == {each["name"] for each in bill["components"]} - {"libbapq"}
    (told,) = bill["dependencies"]
    assert set(told["dependsOn"]) == needed | {"libbapq"}


def test_sizes():
    assert parse_size("64MiB") == 64 << 20
    assert parse_size("1.5 GB") == 1_500_000_000
    assert parse_size(" 100 B ") == parse_size("100B") == parse_size(100) == 100
    assert parse_size(" 2000000 ") == 2_000_000
    assert format_size(1536) == "1.5 KiB"
    assert format_size(64 << 20) == "64.0 MiB"
    assert format_size(12) == "12 B"
    assert (counted(1, "layer"), counted(1200, "layer")) == ("1 layer", "1,200 layers")
    for size in (True, 0, -5, "64mib", "1e6", "MiB", "nan", "64", " 100 ", None):
        with pytest.raises(errors.SizeError):
            parse_size(size)


def test_every_board_profile_reads():
    assert len(profile_names()) >= 5
    for name in profile_names():
        assert load_profile(name).name == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cores": "four"}, "cores"),
        ({"cores": 0}, "cores"),
        ({"cores": True}, "cores"),
        ({"cpu": ""}, "cpu"),
        ({"colour": "red"}, "unknown keys"),
        ({"cores": None}, "cores"),
    ],
)
def test_a_malformed_profile_is_refused(tmp_path, change, message):
    import yaml

    place = Path(bapq_edge.__file__).parents[1] / "device_profiles" / "raspberry_pi_4.yaml"
    values = {**yaml.safe_load(place.read_text()), **change}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(errors.ProfileError, match=message):
        load_profile(path)


def test_an_unknown_profile_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(errors.ProfileError, match="raspberry_pi_4"):
        load_profile("raspberry_pi_6")
    for absent in ("absent.yaml", "absent"):
        with pytest.raises(errors.InputFileError, match="cannot be read: No such file"):
            load_profile(tmp_path / absent)
    (tmp_path / "text").write_text("root:x:0:0\n")  # a path is a file's, whatever it is called
    with pytest.raises(errors.ProfileError, match=r"text: missing keys"):
        load_profile(tmp_path / "text")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(errors.ProfileError, match="missing keys"):
        load_profile(tmp_path / "list.yaml")
