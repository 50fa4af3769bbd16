"""Raspberry Pis that are not there: whole boards of QEMU, with 512 MB, an SD card and a stick.

A board boots Debian's kernel from an image that make_system.sh made and runs the script `run.sh` of
its stick, a small file system made for it. What it prints as JSON, one object a line, are its
records; all it prints is in its log.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BOARDS = ROOT / ".cache" / "boards"
LOGS = ROOT / "build" / "virtual_pi"
GUEST = Path(__file__).with_name("guest")

MEMORY_MIB = 512
SILENCE_S = 600
"""Without a line from it for so long, a board is stuck."""
CARD_BYTES_PER_S = 40_000_000
"""what an SD card gives; all disks of a board are throttled to it"""
CARD_WRITE_BYTES_PER_S = 500_000
"""slow, so that a power cut meets bytes on their way"""
TOOLS = {**os.environ, "PATH": f"{os.environ['PATH']}:/sbin:/usr/sbin"}
"""environment in which mkfs.ext4 is found by any user"""

Record = dict[str, Any]


@dataclass(frozen=True)
class Board:
    """A Raspberry Pi as QEMU can be one."""

    name: str
    model: str
    """as the board's device tree tells it"""
    cpu: str
    cores: int
    system: str
    """Debian's release: that of the Raspberry Pi OS it stands for"""
    page_bytes: int
    kernels: str
    """the family that has to be chosen"""


ZERO_2W = Board(
    "zero2w", "Raspberry Pi Zero 2 W Rev 1.0", "cortex-a53", 1, "bookworm", 4096, "neon"
)
PI_4 = Board("pi4", "Raspberry Pi 4 Model B Rev 1.5", "cortex-a72", 2, "bookworm", 4096, "neon")
PI_5 = Board("pi5", "Raspberry Pi 5 Model B Rev 1.0", "cortex-a76", 4, "trixie", 16384, "neondot")


class BoardError(AssertionError):
    """A board did not do what it was there for; ends with the last lines of its log."""


def make_disk(path: Path, label: str, files: Mapping[str, Path | str], size_mib: int = 0) -> Path:
    """Make an ext4 image that holds `files`: name -> file, directory, or the text itself."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for name, source in files.items():
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, str):
                target.write_text(source)
            elif source.is_dir():
                shutil.copytree(source, target, copy_function=_link)
            else:
                _link(source, target)
        used = sum(file.stat().st_size for file in Path(folder).rglob("*"))
        size_mib = size_mib or (used + used // 8 >> 20) + 16
        path.unlink(missing_ok=True)
        command = ["mkfs.ext4", "-q", "-L", label, "-d", folder, str(path), f"{size_mib}M"]
        subprocess.run(command, check=True, capture_output=True, env=TOOLS)
    return path


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


class Machine:
    """A board that runs. Context manager: at its end the board is switched off, if it is not."""

    def __init__(
        self,
        board: Board,
        stick: Path,
        log: str,
        *,
        disk: Path | None = None,
        keep_disk: bool = False,
        card: Path | None = None,
        systemd: bool = False,
    ) -> None:
        """Switch it on.

        Args:
            board: which.
            stick: image of the stick, read only.
            log: name of the log, without directory and suffix.
            disk: the system's image; None is the one on which bapq-edge is installed.
            keep_disk: let the image keep what the board writes.
            card: image of one more disk, /dev/vdc, which keeps what the board writes.
            systemd: start the whole system, not just the stick's script.
        """
        self.board = board
        folder = BOARDS / board.system
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log = LOGS / f"{log}.log"
        tree = str(LOGS / f"{log}.dtb")
        machine = ["qemu-system-aarch64", "-cpu", board.cpu, "-smp", str(board.cores)]
        machine += ["-m", f"{MEMORY_MIB}M", "-nographic", "-nodefaults", "-no-reboot"]
        _quietly(*machine, "-M", f"virt,dumpdtb={tree}")
        _quietly("fdtput", "-t", "s", tree, "/", "model", board.model)
        append = "console=ttyAMA0 quiet psi=1 panic=-1"
        if systemd:
            append += " boot=/sbin/init systemd.mask=serial-getty@ttyAMA0.service"
        disk = disk or folder / "installed.img"
        command = [
            *machine, "-M", "virt", "-dtb", tree, "-serial", "stdio", "-append", append,
            "-kernel", folder / "vmlinuz", "-initrd", folder / "initrd.gz",
            *_drive("system", disk, "" if keep_disk else ",snapshot=on"),
            *_drive("stick", stick, ",readonly=on"),
            *(_drive("card", card, f",throttling.bps-write={CARD_WRITE_BYTES_PER_S}")
              if card else ()),
        ]  # fmt: skip
        self._started_s = self._heard_s = time.monotonic()
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._records: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self.log.open("w") as log:
            print(f"== {self.board}", file=log)
            for line in self._process.stdout:
                self._heard_s = time.monotonic()
                text = line.decode(errors="replace").rstrip()
                print(f"{time.monotonic() - self._started_s:7.1f} {text}", file=log, flush=True)
                if text.startswith("{"):
                    with contextlib.suppress(ValueError):
                        self._records.put(json.loads(text))
        self._records.put(None)

    def records(self) -> Iterator[Record]:
        """What the board tells, until its script has ended.

        Raises BoardError when the script fails, the board dies or falls silent, or when its kernel
        had to kill a program for want of memory.
        """
        while True:
            record = self.next_record()
            if "ended" not in record:
                yield record
                continue
            if record["ended"] or record["oom_kills"]:
                raise self._error(f"its script ended with {record}")
            self._process.wait(60)  # its disks are written
            return

    def next_record(self) -> Record:
        """The next object that it prints, however long it takes. Raises BoardError.

        On a busy machine all takes long: only a board that prints nothing at all is stuck.
        """
        while True:
            left_s = self._heard_s + SILENCE_S - time.monotonic()
            if left_s <= 0:
                raise self._error(f"silent for {SILENCE_S} s")
            with contextlib.suppress(queue.Empty):
                record = self._records.get(timeout=left_s)
                break
        if record is None:
            raise self._error("it stopped")
        return record

    def told(self) -> list[Record]:
        """What it has told and nobody has heard, of a board that is off."""
        rest = []
        while (record := self._records.get()) is not None:
            rest.append(record)
        return rest

    def _error(self, what: str) -> BoardError:
        lines = self.log.read_text().splitlines()[-40:]
        return BoardError("\n".join([f"{self.board.name}: {what}", *lines]))

    def cut_power(self) -> None:
        """Stop it as a pulled plug does: what its kernel has not written is lost."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.cut_power()


def _drive(name: str, image: Path, options: str) -> list[str | Path]:
    throttle = f"throttling.bps-read={CARD_BYTES_PER_S}"
    drive = f"file={image},if=none,id={name},format=raw,{throttle}{options}"
    return ["-drive", drive, "-device", f"virtio-blk-pci,drive={name}"]


def _quietly(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
