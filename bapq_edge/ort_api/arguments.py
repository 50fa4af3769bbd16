"""The arguments of `onnxruntime.InferenceSession`: what a session of a bank makes of them.

What it cannot honour is an IgnoredSettingWarning, once by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..engine.graph import import_onnxruntime
from ..errors import RequestError
from ..telemetry import warn_ignored

__all__ = ["EngineSettings", "check_providers", "checked_ort_arguments"]

EngineSettings = Mapping[str, Any]
"""Attributes of `onnxruntime.SessionOptions` that the sessions of a bank's graphs are opened with;
names with a dot are entries of its configuration."""

_HONOURED = (
    "enable_mem_reuse",
    "enable_profiling",
    "graph_optimization_level",
    "log_severity_level",
    "log_verbosity_level",
    "logid",
    "profile_file_prefix",
    "use_deterministic_compute",
)
_HONOURED_ENTRIES = (
    "session.disable_prepacking",
    "session.dynamic_block_base",
    "session.intra_op.allow_spinning",
    "session.intra_op_thread_affinities",
    "session.set_denormal_as_zero",
)
_IGNORED = {
    "enable_cpu_mem_arena": "tensors stand in an arena of the bank's runtime",
    "execution_mode": "operators run one after the other",
    "execution_order": "operators run in the order of the bank",
    "optimized_model_filepath": "the graph is in the bank",
    "use_per_session_threads": "every session has threads of its own",
}
_CPU = "CPUExecutionProvider"
_SILENT_PROVIDERS = (_CPU, "AzureExecutionProvider")
"""ONNX Runtime names the second in every installation; it runs no model that is here."""


def checked_ort_arguments(
    sess_options: Any, providers: Any, provider_options: Any
) -> tuple[int | None, EngineSettings]:
    """The threads that are asked for, None for no wish, and the settings for the engine.

    Raises RequestError for what is no such argument.
    """
    check_providers(providers, provider_options)
    if sess_options is None:
        return None, {}
    onnxruntime = import_onnxruntime()
    if not isinstance(sess_options, onnxruntime.SessionOptions):
        raise RequestError(
            f"sess_options is of type {type(sess_options).__name__}: give an "
            "onnxruntime.SessionOptions, or None"
        )
    default = onnxruntime.SessionOptions()

    def differs(name: str) -> bool:
        return bool(getattr(sess_options, name, None) != getattr(default, name, None))

    for name, reason in _IGNORED.items():
        if differs(name):
            warn_ignored(f"SessionOptions.{name}", reason)
    settings = {name: getattr(sess_options, name) for name in _HONOURED if differs(name)}
    for name in _HONOURED_ENTRIES:
        entry = _entry(sess_options, name)
        if entry is not None:
            settings[name] = entry
    return sess_options.intra_op_num_threads or None, settings


def _entry(options: Any, name: str) -> str | None:
    try:
        return str(options.get_session_config_entry(name))
    except RuntimeError:  # there is none
        return None


def check_providers(providers: Any, provider_options: Any) -> None:
    """Raise RequestError for what are no providers; warn of those that a bank does not run on."""
    for name, options in _pairs(providers, provider_options):
        if name not in _SILENT_PROVIDERS:
            warn_ignored(f"provider {name}", "a bank runs on CPUs")
        elif name == _CPU:
            for option in options:
                warn_ignored(f"option {option} of {name}", "it has no meaning for a bank")


def _pairs(providers: Any, provider_options: Any) -> list[tuple[str, Mapping[Any, Any]]]:
    if providers is None:
        return []
    if not isinstance(providers, Sequence) or isinstance(providers, str):
        raise RequestError(
            f"providers is of type {type(providers).__name__}: give a list of names, or of pairs "
            "of a name and its options"
        )
    pairs: list[Any] = [(each, {}) if isinstance(each, str) else each for each in providers]
    if provider_options is not None:
        same = isinstance(provider_options, Sequence) and len(provider_options) == len(providers)
        if not same or not all(isinstance(each, str) for each in providers):
            raise RequestError(
                "provider_options fits providers where it has options for each, and these are "
                "names only"
            )
        pairs = [*zip(providers, provider_options, strict=True)]
    for pair in pairs:
        if not (
            isinstance(pair, tuple)
            and len(pair) == 2
            and isinstance(pair[0], str)
            and isinstance(pair[1], Mapping)
        ):
            raise RequestError(f"provider {pair!r:.80} is neither a name nor a name with options")
    return pairs
