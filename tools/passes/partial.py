"""Quantized layers on disk: a killed build finds them again.

They lie beside the bank in `<bank>.bapq-partial`, one file per layer, until the bank is whole.
Those of another model, other data or other options are recognised by their key and removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zipfile
from pathlib import Path
from types import TracebackType

import numpy as np

from bapq_edge.bank.codes import LayerCodes
from bapq_edge.errors import StorageError

from .ir import HeavyLayer
from .quantize import QuantizedLayer

_KEY_FILE = "key.json"


class PartialBank:
    """Context manager around the folder; on success the folder goes, on failure it stays."""

    def __init__(self, bank: Path, key: dict[str, object]) -> None:
        self.folder = bank.with_name(bank.name + ".bapq-partial")
        self._key = key

    def __enter__(self) -> PartialBank:
        with _storage_errors(self.folder):
            if self._read_key() != self._key:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir()
                (self.folder / _KEY_FILE).write_text(json.dumps(self._key))
            self.scratch.mkdir(exist_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
        # After an error a second build would meet it again; only a killed one is resumed.
        if kind is None or issubclass(kind, Exception):
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def scratch(self) -> Path:
        """Folder for files of this build only."""
        return self.folder / "scratch"

    def put(self, index: int, layer: QuantizedLayer) -> None:
        """Keep a layer; its float weights are not stored."""
        arrays: dict[str, np.ndarray] = {"residual_steps": np.array(layer.residual_steps)}
        arrays |= {f"codes.{plane}": code for plane, code in layer.codes.codes.items()}
        for name in ("scales", "bias"):
            fields = getattr(layer.codes, name)
            arrays |= {f"{name}.{level}": values for level, values in fields.items()}
        arrays |= {f"scale_columns.{k}": np.array(v) for k, v in layer.scale_columns.items()}
        arrays |= {f"row_error.{level}": values for level, values in layer.row_error.items()}
        arrays |= {f"method.{level}": np.array(name) for level, name in layer.method.items()}
        arrays |= {f"output_error.{k}": np.array(v) for k, v in layer.output_error.items()}
        with _storage_errors(self.folder):
            fresh = self._file(index).with_suffix(".new.npz")
            np.savez(fresh, **arrays)
            os.replace(fresh, self._file(index))

    def get(self, index: int, layer: HeavyLayer) -> QuantizedLayer | None:
        """What was kept of the plan's layer of that index; None when there is nothing."""
        try:
            with np.load(self._file(index), allow_pickle=False) as file:
                arrays = dict(file)
        except (OSError, ValueError, zipfile.BadZipFile, KeyError, EOFError):
            return None

        def part(prefix: str) -> dict[str, np.ndarray]:
            return {
                name.removeprefix(prefix + "."): value
                for name, value in arrays.items()
                if name.startswith(prefix + ".")
            }

        def by_level(prefix: str) -> dict[int, np.ndarray]:
            return {int(level): value for level, value in part(prefix).items()}

        weight = layer.weight if "row_error.32" in arrays else None
        codes = LayerCodes(weight, part("codes"), by_level("scales"), by_level("bias"))
        return QuantizedLayer(
            codes,
            int(arrays["residual_steps"]),
            {level: int(value) for level, value in by_level("scale_columns").items()},
            by_level("row_error"),
            {level: str(value) for level, value in by_level("method").items()},
            {level: float(value) for level, value in by_level("output_error").items()},
        )

    def _file(self, index: int) -> Path:
        return self.folder / f"layer_{index}.npz"

    def _read_key(self) -> object:
        try:
            return json.loads((self.folder / _KEY_FILE).read_text())
        except (OSError, ValueError):
            return None


@contextlib.contextmanager
def _storage_errors(folder: Path):
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written: {error.strerror or error}; free space or build elsewhere"
        ) from error
