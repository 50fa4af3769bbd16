"""examples/raspberry_pi: the scripts run, the service keeps its promises, the documents agree."""

from __future__ import annotations

import configparser
import contextlib
import http.client
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import uuid
import zipfile
from pathlib import Path

import numpy as np
import pytest

import bapq_tools
from bapq_edge import Session
from bapq_edge.errors import BankNotFoundError
from benchmarks.zoo.digits import calibration_npz, digits_cnn_path, load_digits_split
from support.documents import board_page, board_section, fenced

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "raspberry_pi"
STUCK_S = 120
"""only a test that fails waits so long"""

CALM = """time_s,available_bytes,temperature_c
0,4000000000,50
"""

PICAMERA2 = '''
"""Stands in for picamera2: shows the digits of images.npy, as large as it was asked to."""
import itertools, pathlib
import numpy as np

class Picamera2:
    def __init__(self):
        self.images = itertools.cycle(np.load(pathlib.Path(__file__).with_name("images.npy")))
        self.started = False

    def create_video_configuration(self, main):
        assert main["format"] == "BGR888"
        return main

    def configure(self, configuration):
        self.size = configuration["size"]

    def start(self):
        self.started = True

    def capture_array(self, name):
        assert self.started and name == "main"
        image = np.rint(next(self.images)[0] * 255).astype(np.uint8)
        columns, rows = (size // 8 for size in self.size)
        return np.repeat(np.kron(image, np.ones((rows, columns), np.uint8))[..., None], 3, axis=2)

    def stop(self):
        self.started = False
        print("stopped")
'''

HUNG = """
import select, sys
from concurrent.futures import Future
import bapq_edge, serve
periods = iter([[]] * 5 + [["a signal"]])
select.select = lambda *_: (next(periods), [], [])
bapq_edge.Session.submit = lambda *_: Future()
sys.exit(serve.main())
"""


@pytest.fixture(scope="module")
def images():
    return load_digits_split().x_test[:6]


@pytest.fixture(scope="module")
def place(tmp_path_factory, images):
    """A folder with what the walk assumes: model.bank and input.npz; and sensors that stay calm."""
    folder = tmp_path_factory.mktemp("pi")
    calibration_npz(folder / "calibration.npz", "cnn")
    bapq_tools.build_bank(
        digits_cnn_path(),
        folder / "model.bank",
        calibration=folder / "calibration.npz",
        levels=(8, 4, 2, 1),
    )
    np.savez(folder / "input.npz", image=images)
    (folder / "calm.csv").write_text(CALM)
    return folder


def environment(place: Path, **changes: str) -> dict[str, str]:
    return {**os.environ, "BAPQ_SENSORS": f"mock:{place / 'calm.csv'}", **changes}


def script(place: Path, name: str, *arguments: object, code: int = 0, **changes: str) -> str:
    """Run an example; its stdout, or after a failure its stderr."""
    result = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(place, **changes),
        timeout=STUCK_S,
    )
    assert result.returncode == code, result.stderr
    return result.stderr if code else result.stdout


def labels(place: Path, images: np.ndarray, level: int) -> list[int]:
    with Session(place / "model.bank", level=level) as session:
        return [int(session.run(None, {"image": x[None]})[0].argmax()) for x in images]


# ---- the scripts ----


def test_classify_answers_at_two_precisions_and_tells_the_switch(place, images):
    out = script(place, "classify.py", place / "model.bank", place / "input.npz")
    answers = [line.split()[1:] for line in out.splitlines() if line.startswith("answers:")]
    assert answers == [[str(label) for label in labels(place, images, level)] for level in (8, 4)]
    assert re.search(r"^8\.00 bits per weight, .* MiB of weights in memory", out, re.MULTILINE)
    assert re.search(r"^switched: .*8\.00 -> 4\.00 bits.*set_level\('4'\)", out, re.MULTILINE)


def test_camera_labels_what_it_sees_and_stops_after_the_frames(place, images, tmp_path):
    (tmp_path / "picamera2.py").write_text(PICAMERA2)
    np.save(tmp_path / "images.npy", images)
    options = (place / "model.bank", "--frames", len(images))
    out = script(place, "camera.py", *options, PYTHONPATH=str(tmp_path)).splitlines()
    assert out.pop() == "stopped"
    shown = [re.search(r"label +(\d+) +([\d.]+)% +8\.00 bits", line) for line in out]
    assert [int(match[1]) for match in shown] == labels(place, images, 8)
    assert all(10 < float(match[2]) <= 100 for match in shown)


def test_camera_without_picamera2_says_how_to_get_it(place, tmp_path):
    (tmp_path / "picamera2.py").write_text("raise ImportError('no libcamera')")
    arguments = (place / "model.bank", "--frames", 1)
    message = script(place, "camera.py", *arguments, code=1, PYTHONPATH=str(tmp_path))
    assert message.count("\n") == 1 and "sudo apt install -y python3-picamera2" in message


# ---- the service ----


class Manager:
    """What systemd is to the service: a socket for its messages, and signals."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.channel.settimeout(STUCK_S)
        self.channel.bind("\0" + address[1:] if address.startswith("@") else address)

    def close(self) -> None:
        self.channel.close()

    def start(self, command: list[object], place: Path, watchdog_s: float) -> subprocess.Popen:
        variables = {
            "NOTIFY_SOCKET": self.address,
            "WATCHDOG_USEC": str(int(watchdog_s * 1e6)),
            "PYTHONPATH": str(EXAMPLES),
        }
        return subprocess.Popen(
            [str(word) for word in command],
            env=environment(place, **variables),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def receive(self, word: str) -> str:
        """The next message, which must begin with that word."""
        message = self.channel.recv(4096).decode()
        assert message.startswith(f"{word}=1"), message
        return message

    def left(self) -> list[str]:
        """The first words of all messages that are there."""
        self.channel.setblocking(False)
        words = []
        while True:
            try:
                words.append(self.channel.recv(4096).decode().partition("=")[0])
            except BlockingIOError:
                return words


@pytest.fixture
def manager(tmp_path):
    with contextlib.closing(Manager(str(tmp_path / "notify"))) as manager:
        yield manager


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str
    parser.read(EXAMPLES / "bapq-serve.service")
    return parser


def command_of_unit(bank: Path) -> list[object]:
    """ExecStart, with the paths of here and any port that is free."""
    command = shlex.split(unit()["Service"]["ExecStart"])
    assert command[:3] == [
        "/home/pi/bapq/bin/python",
        "/home/pi/raspberry_pi/serve.py",
        "/home/pi/model.bank",
    ]
    command[command.index("--port") + 1] = "0"
    return [sys.executable, EXAMPLES / "serve.py", bank, *command[3:]]


@pytest.fixture(scope="module")
def port(place):
    """The port of a service that was said to be ready, on an abstract socket."""
    with contextlib.closing(Manager(f"@bapq-{uuid.uuid4()}")) as manager:
        process = manager.start(command_of_unit(place / "model.bank"), place, watchdog_s=600)
        ready = manager.receive("READY")
    # From here on nobody listens, which is no reason to stop.
    assert re.search(r"8\.00 bits per weight, .* of weights in memory, 1 runs$", ready)
    yield int(re.search(r"port (\d+)", ready)[1])
    process.terminate()
    _, errors = process.communicate(timeout=STUCK_S)
    assert process.returncode == 0 and errors == ""


def ask(port: int, method: str, path: str, body: bytes | None = None, **headers: str):
    """(status, body) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=STUCK_S)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def npz(compress: bool = False, **arrays: np.ndarray) -> bytes:
    body = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(body, **arrays)
    return body.getvalue()


def test_the_service_answers_as_a_session_does_bit_for_bit(port, place, images):
    with Session(place / "model.bank", memory_budget="64MiB") as session:
        for image in images:
            (expected,) = session.run(None, {"image": image[None]})
            status, body = ask(port, "POST", "/run", npz(image=image[None]))
            assert status == 200
            with np.load(io.BytesIO(body)) as outputs:
                assert outputs.files == ["logits"]
                np.testing.assert_array_equal(outputs["logits"], expected)
    status, body = ask(port, "GET", "/stats")
    stats = json.loads(body)
    assert status == 200 and stats["runs"] >= 7 and stats["bits_per_weight"] == 8
    assert "kernels" in stats["events"][0]


def test_ask_prints_the_labels(port, place, images):
    out = script(place, "ask.py", place / "input.npz", "--port", port)
    found = re.search(r"^logits: float32 \[6, 10\]\n  largest at (.*)", out)
    assert len(found[1].split()) == len(images)


def bad_bodies() -> dict[str, bytes]:
    image = np.zeros((1, 1, 8, 8), np.float32)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", bytes(17 << 20))
    return {
        "empty": b"",
        "text": b"image=1",
        "cut off": npz(image=image)[:-30],
        "damaged": npz(compress=True, image=image).replace(b"NUMPY", b"XXXXX")[:80] + b"\0" * 300,
        "pickled": npz(image=np.array([{}], dtype=object)),
        "too large unpacked": bomb.getvalue(),
        "another name": npz(photo=image),
        "one too many": npz(image=image, more=image),
        "another shape": npz(image=image[..., :5]),
        "another type": npz(image=image.astype(np.int64)),
    }


@pytest.mark.parametrize("name", bad_bodies())
def test_a_bad_body_is_refused_in_one_line_and_the_service_lives_on(port, name):
    status, body = ask(port, "POST", "/run", bad_bodies()[name])
    assert status == 400, body
    assert len(body) > 20 and body.count(b"\n") == 1 and body.endswith(b"\n")
    status, _ = ask(port, "POST", "/run", npz(image=np.zeros((1, 1, 8, 8), np.float32)))
    assert status == 200


@pytest.mark.parametrize("length", ["", "many", "-1", "16777217", "9" * 5000])
def test_a_body_of_wrong_length_is_not_read(port, length):
    status, body = ask(port, "POST", "/run", **{"Content-Length": length})
    assert status == 400 and body.startswith(b"Content-Length is") and body.count(b"\n") == 1


def test_an_unknown_path_says_which_there_are(port):
    for method in ("GET", "POST"):
        status, body = ask(port, method, "/else", b"")
        assert status == 400 and b"POST /run, GET /stats" in body


def test_an_idle_service_says_that_it_lives_and_ends_on_sigterm(manager, place):
    process = manager.start(command_of_unit(place / "model.bank"), place, watchdog_s=0.5)
    manager.receive("READY")
    for _ in range(3):
        assert "bits per weight" in manager.receive("WATCHDOG")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=STUCK_S)
    assert process.returncode == 0 and errors == ""
    assert manager.left()[-1] == "STOPPING"


def test_a_service_whose_runs_hang_does_not_say_that_it_lives(manager, place):
    command = [sys.executable, "-c", HUNG, place / "model.bank", "--port", "0"]
    process = manager.start(command, place, watchdog_s=0.5)
    _, errors = process.communicate(timeout=STUCK_S)
    assert process.returncode == 0, errors
    # The one WATCHDOG is for the run on zeros before READY.
    assert manager.left() == ["READY", "WATCHDOG", "STOPPING"]


def test_a_service_without_a_bank_is_never_ready(manager, place):
    process = manager.start(command_of_unit(place / "no.bank"), place, watchdog_s=60)
    _, errors = process.communicate(timeout=STUCK_S)
    assert process.returncode == BankNotFoundError.exit_code
    assert errors.startswith("serve: ") and errors.count("\n") == 1
    assert manager.left() == []


# ---- the documents ----


def test_both_documents_install_alike_and_every_block_says_what_it_is():
    page, section = fenced(board_page()), fenced(board_section())
    assert page[0] == section[0] and page[0][0] == "sh"
    kinds = {info for info, _ in page + section}
    assert kinds <= {"sh", "sh not-emulated", "python", "ini", "text"}


def test_every_file_that_the_walk_names_is_there():
    page = board_page()
    named = set(re.findall(r"~/raspberry_pi/([\w.-]+)", page))
    assert {"serve.py", *named} == {path.name for path in EXAMPLES.iterdir()} - {"README.md"} - {
        "__pycache__"
    }
