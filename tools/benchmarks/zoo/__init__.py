"""The models that demo, tests and reports run on, each built or found by name."""

from __future__ import annotations

import shutil
from pathlib import Path

from .digits import digits_cnn_path, digits_mlp_path
from .digits_resnet import build_digits_resnet
from .light_cnns import LIGHT_CNNS, build_light_cnn
from .minilm import build_minilm, minilm_dir

__all__ = ["MODELS", "make_model"]

MODELS: tuple[str, ...] = ("digits_cnn", "digits_mlp", "digits_resnet", "minilm", *LIGHT_CNNS)


def make_model(name: str, out_path: str | Path) -> None:
    """Write the ONNX file of one of MODELS; the same bytes every time."""
    if name == "digits_cnn":
        shutil.copyfile(digits_cnn_path(), out_path)
    elif name == "digits_mlp":
        shutil.copyfile(digits_mlp_path(), out_path)
    elif name == "digits_resnet":
        build_digits_resnet(out_path)
    elif name == "minilm":
        build_minilm(minilm_dir(), out_path)
    else:
        build_light_cnn(name, out_path)
