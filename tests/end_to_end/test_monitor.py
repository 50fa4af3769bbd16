"""A running session seen from outside: its socket, `bapq monitor`, its pages and its metrics."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import socket
import stat
import tempfile
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest

from bapq_edge import Session
from bapq_edge.errors import NoMonitorError, RequestError, StorageError
from bapq_edge.live.status import to_prometheus
from bapq_edge.live.status_socket import StatusServer, find_sockets, read_status, socket_folder
from bapq_tools.commands.monitor import StatusPages
from support.streaming import chain_bank, run

X = np.ones((2, 96), np.float32)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return chain_bank(tmp_path_factory.mktemp("monitor") / "m.bank")


@pytest.fixture(autouse=True)
def runtime(monkeypatch):
    """A socket's path must be short; pytest's own folders are deep."""
    with tempfile.TemporaryDirectory(prefix="bapq-") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        monkeypatch.delenv("BAPQ_MONITOR", raising=False)
        yield


def test_a_session_tells_only_when_it_is_asked_to(bank, monkeypatch):
    threads = threading.active_count()
    with Session(bank):
        assert find_sockets() == [] and threading.active_count() == threads
    monkeypatch.setenv("BAPQ_MONITOR", "1")
    with Session(bank):
        assert len(find_sockets()) == 1
    with Session(bank, monitor=False):
        assert find_sockets() == []
    with pytest.raises(RequestError, match="monitor is 'yes'"):
        Session(bank, monitor="yes")


def test_what_is_told_is_what_the_session_does(bank):
    with Session(bank, level=8, threads=1, monitor=True) as session:
        (path,) = find_sockets()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        for _ in range(3):
            run(session, X)
        session.set_level(2)
        told = read_status(path)
        assert told["pid"] == os.getpid() and told["bank"]["path"] == os.path.realpath(bank)
        assert told["stats"]["runs"] == 3 and told["stats"]["switches"] == 1
        assert [layer["highest_level"] for layer in told["layers"]] == [2, 2, 2]
        assert told["events"][-1]["reason"] == "set_level(2)"
        assert told["budget_bytes"] is None and told["readings"] is None
        assert told.keys() == session.status().keys()
    assert find_sockets() == [] and not path.exists()
    with pytest.raises(NoMonitorError, match="no session tells its status"):
        read_status(path)


def test_two_sessions_have_a_socket_each_and_a_dropped_one_takes_its_own_along(bank):
    with Session(bank, level=8, monitor=True), Session(bank, level=2, monitor=True) as second:
        first_path, second_path = find_sockets()
        assert read_status(first_path)["stats"]["level"] == 8
        assert read_status(second_path)["stats"]["level"] == 2
        del second
    with pytest.warns(ResourceWarning):
        dropped = Session(bank, monitor=True)
        (path,) = find_sockets()
        del dropped
        gc.collect()
    while path.exists():
        pass


def test_peers_that_hang_talk_or_go_away_cost_the_session_nothing(bank):
    with Session(bank, level=8, monitor=True) as session:
        (path,) = find_sockets()
        peers = []
        for number in range(6):
            peer = socket.socket(socket.AF_UNIX)
            peer.connect(str(path))
            peers.append(peer)
            if number % 2:
                peer.close()
            else:
                with contextlib.suppress(BrokenPipeError):  # it was answered already
                    peer.send(b'{"set_level": 1}' * 100)
        expected = run(session, X)
        assert read_status(path)["stats"]["level"] == 8
        np.testing.assert_array_equal(run(session, X), expected)
        for peer in peers:
            peer.close()


def test_a_status_that_cannot_be_made_ends_nothing():
    def fail():
        raise ZeroDivisionError

    server = StatusServer(fail)
    with pytest.raises(NoMonitorError):
        read_status(server.path)
    server._tell = lambda: {"protocol": 1}
    assert read_status(server.path) == {"protocol": 1}
    server.close()


def test_a_folder_that_others_can_write_to_is_refused(bank):
    socket_folder().mkdir(mode=0o777)
    socket_folder().chmod(0o777)
    with pytest.raises(StorageError, match="is not a directory of yours alone"):
        Session(bank, monitor=True)
    with pytest.raises(StorageError, match="is not a directory of yours alone"):
        find_sockets()


def test_the_socket_of_a_process_that_was_killed_is_swept_up(bank):
    socket_folder().mkdir(mode=0o700)
    left = socket.socket(socket.AF_UNIX)
    path = socket_folder() / "999999999-1.sock"
    left.bind(str(path))
    left.close()
    assert find_sockets() == [] and not path.exists()


def test_the_command(bapq, bank):
    assert "open it with Session(monitor=True)" in bapq("monitor", code=64)[1]
    with Session(bank, level=8, monitor=True, memory_budget="1GiB") as session:
        run(session, X)
        (path,) = find_sockets()
        out, _ = bapq("monitor", "--once")
        assert re.search(r"budget +1.0 GiB", out) and "fc1" in out and "level 8" in out
        for wanted in ([], [str(os.getpid())], [path]):
            told = json.loads(bapq("monitor", *wanted, "--once", "--json")[0])
            assert told["stats"]["runs"] == 1
        with Session(bank, monitor=True):
            assert "there are 2 sessions" in bapq("monitor", code=40)[1]
        assert "--interval is 0" in bapq("monitor", "--interval", "0", code=40)[1]
        assert "process 1 has no session" in bapq("monitor", "1", code=64)[1]


@pytest.fixture
def pages(bank):
    with Session(bank, level=8, monitor=True, threads=1) as session:
        run(session, X)
        server = StatusPages(find_sockets()[0], 0, 1.0)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server, session
        server.shutdown()
        thread.join()
        server.server_close()


def get(server, path, **headers):
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.server_port}{path}", headers=headers
    )
    with urllib.request.urlopen(request) as answer:
        return answer.read().decode()


def refusal(server, path, **headers):
    """The code of an answer that is an error."""
    try:
        get(server, path, **headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    return None


def test_the_page_loads_nothing_from_elsewhere_and_again_by_itself(pages):
    server, session = pages
    page = get(server, "/")
    session.set_level(4)
    page = get(server, "/")
    assert '<meta http-equiv="refresh" content="1">' in page
    assert "<script" not in page and not re.search(r"(?:src|href)=", page)
    assert "set_level(4)" in page and "<svg" in page and "fc1" in page
    assert json.loads(get(server, "/status"))["stats"]["level"] == 4


def test_other_sites_and_other_paths_get_nothing(pages):
    server, _ = pages
    assert refusal(server, "/", Host=f"evil.example:{server.server_port}") == 403
    assert refusal(server, "/etc/passwd") == 404


def test_the_page_says_that_the_session_was_closed(pages):
    server, session = pages
    session.close()
    assert refusal(server, "/") == 503


METRIC = re.compile(r'(bapq_[a-z_]+)\{bank="((?:[^"\\\n]|\\["\\n])*)",pid="\d+"\} (\S+)')


def test_metrics_are_in_the_format_of_prometheus(pages, bank):
    server, session = pages
    text = get(server, "/metrics")
    assert text == to_prometheus([session.status()]) or "resident" in text
    told, kinds = {}, {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            current = line.split()[2]
            assert current not in kinds
        elif line.startswith("# TYPE "):
            assert line.split()[2] == current
            kinds[current] = line.split()[3]
        else:
            name, label, value = METRIC.fullmatch(line).groups()
            assert name == current and label == bank.name
            told[name] = float(value)
    assert told["bapq_runs_total"] == 1 and kinds["bapq_runs_total"] == "counter"
    assert told["bapq_planned_bits_per_weight"] == 8
    assert all(kind in ("counter", "gauge") for kind in kinds.values())
    assert all(name.endswith("_total") == (kind == "counter") for name, kind in kinds.items())
    assert "bapq_budget_bytes" not in told
    status = session.status()
    status["bank"]["path"] = '/a/we"ird\\\n.bank'
    assert 'bank="we\\"ird\\\\\\n.bank"' in to_prometheus([status])
    assert to_prometheus([]) == ""
