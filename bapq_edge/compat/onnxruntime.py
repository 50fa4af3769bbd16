"""Banks for programs that open models with ONNX Runtime and that nobody may edit.

    bapq_edge.patch_onnxruntime({"model.onnx": "model.bank"}, memory_budget="64MiB")

From then on `onnxruntime.InferenceSession("model.onnx")` is a `bapq_edge.Session` of the bank. All
other models stay with ONNX Runtime.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bank.files import digest_of
from ..bank.reader import Bank
from ..engine.graph import import_onnxruntime
from ..errors import RequestError
from ..session import Session
from ..telemetry import logger, warn_ignored

__all__ = ["OnnxruntimePatch", "patch_onnxruntime"]


@dataclass(frozen=True)
class _Entry:
    """A model that a bank stands in for."""

    model: Path
    bank: Path
    settings: Mapping[str, Any]
    source_bytes: int
    source_blake2b: str

    def is_path(self, path: Path) -> bool:
        """Whether the model is that file: the same one, or one whose path ends so."""
        parts = self.model.parts
        if not self.model.is_absolute() and path.parts[-len(parts) :] == parts:
            return True
        try:
            return os.path.samefile(self.model, path)
        except OSError:
            return False

    def is_content(self, model: bytes) -> bool:
        """Whether the bank was built from these bytes."""
        return len(model) == self.source_bytes and digest_of(model) == self.source_blake2b


_patches: list[OnnxruntimePatch] = []
"""Those in force; the last one that knows a model decides."""
_lock = threading.Lock()


class OnnxruntimePatch:
    """What `patch_onnxruntime` did: `undo` it, or use it as a context."""

    def __init__(self, entries: Iterable[_Entry]) -> None:
        """Put it in force."""
        self._entries = tuple(entries)
        with _lock:
            _patches.append(self)
            session_class = import_onnxruntime().InferenceSession
            if "__new__" not in vars(session_class):
                session_class.__new__ = _new

    def undo(self) -> None:
        """Give the models back to ONNX Runtime; sessions that are open stay as they are."""
        with _lock:
            if self in _patches:
                _patches.remove(self)

    def __enter__(self) -> OnnxruntimePatch:
        """Give the patch itself."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Undo it."""
        self.undo()

    def entry_of(self, model: object) -> _Entry | None:
        """The bank that stands in for a model, by its path or its bytes."""
        if isinstance(model, bytes):
            found = (entry for entry in self._entries if entry.is_content(model))
        elif isinstance(model, str | os.PathLike):
            path = Path(os.fsdecode(model))
            found = (entry for entry in self._entries if entry.is_path(path))
        else:
            return None
        return next(found, None)


def patch_onnxruntime(
    banks: Mapping[str | os.PathLike[str], str | os.PathLike[str]], **settings: Any
) -> OnnxruntimePatch:
    """Let `onnxruntime.InferenceSession` open banks in place of some models.

    Args:
        banks: by the path of each model, the path of its bank. A relative path also means every
            file whose path ends so, such as "models/det.onnx" in a package's directory. A model
            that a program gives as bytes is known by its digest, which the bank holds.
        settings: what `bapq_edge.Session` takes besides, for all of these banks, such as
            `memory_budget="64MiB"`.

    Returns:
        The patch, which `undo()` ends; as a context, it ends with the block.

    Raises:
        RequestError: `banks` is no mapping of paths.
        BankError and its kinds: a bank cannot be read.
    """
    if not isinstance(banks, Mapping):
        raise RequestError(
            f"banks is of type {type(banks).__name__}: give a dict of models and their banks"
        )
    entries = []
    for model, bank in banks.items():
        if not isinstance(model, str | os.PathLike) or not isinstance(bank, str | os.PathLike):
            raise RequestError(f"{model!r:.80}: {bank!r:.80} are not the paths of model and bank")
        place = Path(os.path.abspath(os.fsdecode(bank)))
        source = Bank.open(place).manifest.model
        entries.append(
            _Entry(Path(os.fsdecode(model)), place, settings, source.bytes, source.blake2b)
        )
    return OnnxruntimePatch(entries)


def _new(cls: type, *arguments: Any, **keywords: Any) -> Any:
    """In place of `InferenceSession.__new__`: what is no instance of the class is not initialised.

    So programs that imported the class before get banks, too.
    """
    own = keywords.get("path_or_bytes", arguments[0] if arguments else None)
    with _lock:
        known = [patch.entry_of(own) for patch in reversed(_patches)]
    entry = next(filter(None, known), None)
    if entry is None:
        return object.__new__(cls)
    if cls is not import_onnxruntime().InferenceSession:
        warn_ignored(
            f"patch_onnxruntime for {cls.__name__}",
            "only InferenceSession itself opens banks, a class that inherits from it does not",
        )
        return object.__new__(cls)
    logger.info("%s: opened in place of %s", entry.bank, entry.model)
    return _open(entry, *arguments, **keywords)


def _open(
    entry: _Entry,
    path_or_bytes: object,
    sess_options: Any = None,
    providers: Any = None,
    provider_options: Any = None,
    **more: Any,
) -> Session:
    for name in (name for name, value in more.items() if value is not None):
        warn_ignored(f"InferenceSession({name}=...)", "it has no meaning for a bank")
    return Session(entry.bank, sess_options, providers, provider_options, **entry.settings)
