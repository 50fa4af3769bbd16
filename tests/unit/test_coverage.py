"""A build says which share of the weights it left in float and why, and fails where it is asked."""

from __future__ import annotations

import pytest
from onnx import helper

from bapq_edge.cli import main
from bapq_edge.errors import CoverageError, RequestError
from bapq_tools import build_bank
from support import onnx_models as models
from support.onnx_models import FLOAT, weights

node = helper.make_node

pytestmark = pytest.mark.filterwarnings("ignore::bapq_edge.errors.UncalibratedWarning")


def mixed():
    """3072 weights in a product, 1024 in a constant factor."""
    return models.model(
        [node("MatMul", ["x", "w"], ["h"], "product"), node("Mul", ["x", "f"], ["y"], "factor")],
        {"x": (FLOAT, ["n", 32])},
        {"h": (FLOAT, None), "y": (FLOAT, None)},
        {"w": weights(32, 96), "f": weights(32, 32)},
    )


def test_a_build_and_inspect_tell_the_coverage(tmp_path, capsys):
    path = tmp_path / "m.onnx"
    path.write_bytes(mixed().SerializeToString())
    expected = "75.0% of the weights in planes; 25.0% in float: no chunk operator for Mul"
    main(["build", str(path), "-o", str(tmp_path / "m.bank"), "--min-coverage", "0.75"])
    assert capsys.readouterr().out.rstrip().endswith(f"coverage: {expected}")
    main(["inspect", str(tmp_path / "m.bank")])
    assert capsys.readouterr().out.rstrip().endswith(f"coverage: {expected}")


def test_too_little_coverage_fails_the_build_early(tmp_path):
    with pytest.raises(
        CoverageError, match=r"only 75\.0% .* no chunk operator .* 90\.0% was asked"
    ):
        build_bank(mixed(), tmp_path / "m.bank", min_coverage=0.9, progress=False)
    assert not (tmp_path / "m.bank").exists()
    report = build_bank(mixed(), tmp_path / "m.bank", progress=False)
    assert report.coverage == 0.75
    assert report.weights_in_float == {"no chunk operator for Mul": 1024}
    with pytest.raises(RequestError, match="min_coverage is 90"):
        build_bank(mixed(), tmp_path / "m.bank", min_coverage=90, progress=False)
