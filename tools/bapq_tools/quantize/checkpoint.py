"""Quantized layers on disk: a build that was stopped finds them again.

They lie beside the bank in `<bank>.bapq-partial`, one file per layer, until the bank is whole.
Those of another model, other data, other options or another version are recognised by their key
and removed; a damaged one is recognised by the digest in its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from bapq_edge.bank.codes import LayerCodes
from bapq_edge.bank.files import digest_of_file
from bapq_edge.bank.layer import Method
from bapq_edge.bank.layout import LEVELS, PLANES, Level, Plane, planes_for
from bapq_edge.bank.staging import lock_directory, storage_errors
from bapq_edge.errors import ClusterError, StorageError, WorkerError

from ..onnx_graph.ir import HeavyLayer
from .quantized_layer import QuantizedLayer

_KEY_FILE = "key.json"
_LAYER_FILE = re.compile(r"layer_(\d+)\.([0-9a-f]{32})\.npz")
_METHODS: dict[str, Method] = {"nearest": "nearest", "compensated": "compensated"}


class Checkpoint:
    """Context manager around the folder of quantized layers.

    The folder goes when the bank is whole, or when another try would fail alike. It stays after a
    kill, Ctrl-C, a full disk or a lost worker.
    """

    def __init__(
        self, bank: Path, key: Mapping[str, object], say: Callable[[str], None] = lambda _: None
    ) -> None:
        """`key` holds all that the layers depend on; `say` is told what is found and what stays."""
        bank = Path(os.path.realpath(bank))
        self.folder = bank.with_name(bank.name + ".bapq-partial")
        self._key = json.loads(json.dumps(key))
        self._say = say
        self._files: dict[int, Path] = {}
        self._lock = -1

    def __enter__(self) -> Checkpoint:
        """Raises StorageError, also when another build works in the folder."""
        with storage_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
            self._lock = lock_directory(self.folder)
            if self._read_key() != self._key:
                _empty(self.folder)
                (self.folder / _KEY_FILE).write_text(json.dumps(self._key))
            for path in self.folder.iterdir():
                found = _LAYER_FILE.fullmatch(path.name)
                if found and digest_of_file(path) == found[2]:
                    self._files[int(found[1])] = path
                elif path.name != _KEY_FILE:
                    _remove(path)
            self.scratch.mkdir()
        if self._files:
            self._say(f"going on from {len(self._files)} quantized layers in {self.folder}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stays = kind is not None and (
            issubclass(kind, (StorageError, ClusterError, WorkerError, MemoryError))
            or not issubclass(kind, Exception)
        )
        stays = stays and bool(self._files)
        with contextlib.suppress(OSError):
            _remove(self.scratch if stays else self.folder)
        if stays:
            kept = f"{len(self._files)} quantized layers stay in {self.folder}"
            self._say(f"{kept}: the same build goes on from there")
        os.close(self._lock)

    @property
    def scratch(self) -> Path:
        """A folder for files of this build only."""
        return self.folder / "scratch"

    def __contains__(self, index: int) -> bool:
        return index in self._files

    def __len__(self) -> int:
        return len(self._files)

    def put(self, index: int, layer: QuantizedLayer) -> None:
        """Keep a layer; its float weights are not stored."""
        codes = layer.codes
        arrays: dict[str, np.ndarray] = {"residual_steps": np.array(layer.residual_steps)}
        for plane, code in codes.codes.items():
            arrays[f"codes.{plane}"] = _packed(plane, code)
            arrays["columns"] = np.array(code.shape[1])
        arrays |= {f"scales.{level}": values for level, values in codes.scales.items()}
        arrays |= {f"bias.{level}": values for level, values in codes.bias.items()}
        arrays |= {f"scale_columns.{k}": np.array(v) for k, v in layer.scale_columns.items()}
        arrays |= {f"row_error.{level}": values for level, values in layer.row_error.items()}
        arrays |= {f"method.{level}": np.array(name) for level, name in layer.method.items()}
        arrays |= {f"output_error.{k}": np.array(v) for k, v in layer.output_error.items()}
        with storage_errors(self.folder):
            fresh = self.scratch / "layer.npz"
            np.savez(fresh, **arrays)  # type: ignore[arg-type]  # no array is allow_pickle
            path = self.folder / f"layer_{index}.{digest_of_file(fresh)}.npz"
            os.replace(fresh, path)
        self._files[index] = path

    def get(self, index: int, layer: HeavyLayer, level: Level | None = None) -> QuantizedLayer:
        """Read what was kept of the plan's layer of that index; only codes of `level`, if given."""
        wanted = PLANES if level is None else planes_for((level,))
        with storage_errors(self._files[index]), np.load(self._files[index]) as file:
            columns = int(file["columns"]) if "columns" in file else 0

            def by_level(prefix: str) -> dict[Level, np.ndarray]:
                names = {level: f"{prefix}.{level}" for level in LEVELS}
                return {level: file[name] for level, name in names.items() if name in file}

            row_error = by_level("row_error")
            codes = LayerCodes(
                layer.weight if 32 in row_error else None,
                {
                    plane: _unpacked(plane, file[f"codes.{plane}"], columns)
                    for plane in wanted
                    if f"codes.{plane}" in file
                },
                by_level("scales"),
                by_level("bias"),
            )
            return QuantizedLayer(
                codes,
                int(file["residual_steps"]),
                {level: int(value) for level, value in by_level("scale_columns").items()},
                row_error,
                {level: _METHODS[str(value)] for level, value in by_level("method").items()},
                {level: float(value) for level, value in by_level("output_error").items()},
            )

    def _read_key(self) -> object:
        try:
            return json.loads((self.folder / _KEY_FILE).read_text())
        except (OSError, ValueError):
            return None


def _packed(plane: Plane, code: np.ndarray) -> np.ndarray:
    """Put codes of 4 or 1 bits, (rows, columns), side by side in bytes."""
    if plane in ("s1", "m1"):
        return np.packbits(code, axis=1)
    if code.shape[1] % 2:
        code = np.pad(code, ((0, 0), (0, 1)))
    result: np.ndarray = code[:, ::2] | code[:, 1::2] << 4
    return result


def _unpacked(plane: Plane, packed: np.ndarray, columns: int) -> np.ndarray:
    """Do the inverse of `_packed`."""
    if plane in ("s1", "m1"):
        return np.unpackbits(packed, axis=1, count=columns)
    code = np.empty((len(packed), 2 * packed.shape[1]), np.uint8)
    code[:, ::2], code[:, 1::2] = packed & 15, packed >> 4
    return code[:, :columns]


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
