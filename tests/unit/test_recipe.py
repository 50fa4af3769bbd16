"""Recipes: what they say, what they may not say, and what a build makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from onnx import helper

from bapq_edge import Session
from bapq_edge.bank.reader import Bank
from bapq_edge.bank.verify import verify
from bapq_edge.cli import main
from bapq_edge.errors import InputFileError, RecipeError
from bapq_tools import build_bank
from bapq_tools.analyze import analyze
from bapq_tools.quantize.options import LayerOptions
from bapq_tools.recipe import load_recipe
from support import onnx_models as models
from support.onnx_models import FLOAT, weights

node = helper.make_node
NAMES = ("stem", "body.1", "body.2", "body.10", "head")
LOW = (8, 4, 2, 1)


def chain():
    """x (n, 32) through products named as in NAMES to y (n, 40)."""
    widths = (32, 64, 48, 48, 64, 40)
    nodes, constants, source = [], {}, "x"
    for i, name in enumerate(NAMES):
        target = "y" if i == len(NAMES) - 1 else f"h{i}"
        constants[f"w{i}"] = weights(*widths[i : i + 2], seed=i)
        nodes += [
            node("MatMul", [source, f"w{i}"], [f"p{i}"], name),
            node("Relu", [f"p{i}"], [target]),
        ]
        source = target
    return models.model(nodes, {"x": (FLOAT, ["n", 32])}, {"y": (FLOAT, ["n", 40])}, constants)


@pytest.fixture
def samples():
    return {"x": weights(20, 32)}


def file_of(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


def test_without_a_recipe_all_layers_have_the_bank_s_levels():
    assert load_recipe(None).resolve(NAMES) == dict.fromkeys(NAMES, LayerOptions(LOW))
    assert load_recipe({}).with_settings((4, 2), 0.1).resolve(["a"]) == {
        "a": LayerOptions((4, 2), {}, 0.1)
    }


def test_later_entries_win_setting_by_setting(tmp_path):
    recipe = load_recipe(
        file_of(
            tmp_path,
            """
            prune_tau: 0.01
            scale_columns: {2: 32}
            layers:
              "body.*": {levels: [4, 8], prune_tau: 0.05}
              body.1: {keep_in_float: true, scale_columns: {2: 96, 1: 64}}
              "*": {prune_tau: 0}
              body.?: {keep_in_float: false}
              head: {keep_in_float: yes}
            """,
        )
    )
    found = recipe.resolve(NAMES)
    assert found["stem"] == LayerOptions(LOW, {2: 32}, 0.0)
    assert found["body.1"] == LayerOptions((8, 4), {2: 96, 1: 64}, 0.0)
    assert found["body.2"] == found["body.10"] == LayerOptions((8, 4), {2: 32}, 0.0)
    assert found["head"] is None


def test_the_caller_stands_in_for_the_settings_of_all_layers(tmp_path):
    recipe = load_recipe(
        {"levels": [8, 2], "prune_tau": 0.1, "layers": {"head": {"prune_tau": 0.2}}}
    )
    assert recipe.levels == (8, 2)
    found = recipe.with_settings((8, 4), 0.3).resolve(NAMES)
    assert found["stem"] == LayerOptions((8, 4), {}, 0.3)
    assert found["head"] == LayerOptions((8, 4), {}, 0.2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is 'None', must be a mapping of settings"),
        ("- a", "must be a mapping of settings"),
        ("layers: [a]", "layers is \"['a']\", must be a mapping of layer names"),
        ("layers: {head: }", "layers.head is 'None', must be a mapping of levels, scale_columns"),
        ("layers: {12: {levels: [8]}}", "layers is '12', must be keyed by names or patterns; put"),
        (
            "level: [8]",
            "unknown key 'level'; known are levels, scale_columns, keep_in_float, prune_",
        ),
        ("layers: {head: {layers: {}}}", "layers.head: unknown key 'layers'"),
        ("levels: 8", "levels is '8', must be a list of one or more of 32, 8, 4, 2, 1, each once"),
        ("levels: []", "levels is '[]'"),
        ("levels: [8, 8]", "levels is '[8, 8]'"),
        ("levels: [8, 3]", "levels is '[8, 3]'"),
        ("levels: [true]", "levels is '[True]'"),
        ("scale_columns: 32", "must be a mapping of 4, 2, 1 to columns per scale"),
        ("scale_columns: {8: 32}", "must be a mapping of 4, 2, 1"),
        ("scale_columns: {'4': 32}", "must be a mapping of 4, 2, 1"),
        ("scale_columns: {4: 48}", "scale_columns.4 is '48', must be a multiple of 32"),
        ("scale_columns: {4: 0}", "scale_columns.4 is '0', must be a multiple of 32"),
        ("scale_columns: {4: 32.0}", "scale_columns.4 is '32.0'"),
        ("keep_in_float: 1", "keep_in_float is '1', must be true or false"),
        ("prune_tau: 1", "prune_tau is '1', must be a number from 0 to below 1, such as"),
        ("prune_tau: -0.1", "prune_tau is '-0.1'"),
        ("prune_tau: .nan", "prune_tau is 'nan'"),
        ("prune_tau: 1e-2", "prune_tau is '1e-2', must be a number"),  # text to YAML
        ("prune_tau: true", "prune_tau is 'True'"),
        ("levels: [8]\nlevels: [4]", "is not YAML: 'levels' stands there twice"),
        ("layers: {head: {levels: [8]}, head: {}}", "'head' stands there twice"),
        ("layers: {", "is not YAML"),
        ("!!python/object/apply:os.getpid []", "is not YAML: could not determine a constructor"),
        ("? [a]\n: 1", "is not YAML"),
    ],
)
def test_what_is_no_recipe(tmp_path, text, message):
    path = file_of(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"recipe {path}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"layers": {"haed": {}}}, "'haed' fits no layer of the model; near are head"),
        (
            {"layers": {"xyz*": {}}},
            "fits no layer of the model; its layers are stem, body.1, body.2 and",
        ),
        (
            {"layers": {"head": {"levels": [32]}}},
            "layer head is to have level 32, the bank has 8, 4, 2",
        ),
        (
            {"keep_in_float": True},
            "all layers are kept in float, a bank needs at least one that is not",
        ),
        (
            {"layers": {"*": {"levels": [8, 4, 2]}}},
            "no layer has level 1, which the bank is to have",
        ),
    ],
)
def test_what_does_not_fit_the_model(recipe, message):
    with pytest.raises(RecipeError, match=message.replace("*", r"\*")):
        load_recipe(recipe).resolve(NAMES)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputFileError, match=r"no\.yaml cannot be read: No such file"):
        load_recipe(tmp_path / "no.yaml")


def test_a_build_follows_its_recipe(samples, tmp_path):
    recipe = {
        "scale_columns": {2: 32},
        "layers": {
            "body.*": {"levels": [8, 4]},
            "body.10": {"keep_in_float": True},
            "stem": {"scale_columns": {4: 64}},
        },
    }
    path = build_bank(
        chain(), tmp_path / "a.bank", calibration=samples, progress=False, recipe=recipe
    )
    manifest = Bank.open(path).manifest
    found = {layer.name: (layer.levels, layer.scale_columns) for layer in manifest.layers}
    assert found == {
        "stem": (LOW, {4: 64, 2: 32, 1: 128}),
        "body.1": ((8, 4), {4: 32}),
        "body.2": ((8, 4), {4: 32}),
        "head": (LOW, {4: 32, 2: 32, 1: 128}),
    }
    (kept,) = manifest.kept_in_float
    assert (kept.name, kept.operator, kept.weights) == ("body.10", "MatMul", 48 * 64)
    assert kept.reason == "the recipe keeps it in float"
    assert verify(path).ok
    (expected,) = models.run(chain(), samples)
    errors = {}
    for level in LOW:
        with Session(path, level=level) as session:
            (y,) = session.run(None, samples)
        errors[level] = np.linalg.norm(y - expected) / np.linalg.norm(expected)
    assert errors[8] < 0.02 < errors[4] < 0.2 < errors[2] < errors[1]


def test_a_wrong_recipe_leaves_the_old_bank(samples, tmp_path):
    out = Path(build_bank(chain(), tmp_path / "a.bank", calibration=samples, progress=False))
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(RecipeError):
        build_bank(chain(), out, calibration=samples, progress=False, recipe={"layers": {"no": {}}})
    assert (out / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.bank"]


# ---- analysis ----


def test_analysis_is_a_recipe_that_a_build_takes_unchanged(samples, tmp_path, capsys):
    """A layer of unusual weights stands out; the recipe takes the level that fails it away."""
    model = chain()
    outliers = weights(32, 64)
    outliers[::7] *= 30
    model.graph.initializer[0].raw_data = outliers.tobytes()
    big = weights(64, 4000)  # so that sparing the others costs little
    model.graph.initializer[4].CopyFrom(models.numpy_helper.from_array(big, "w4"))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4000
    file, data = tmp_path / "m.onnx", tmp_path / "data.npz"
    file.write_bytes(model.SerializeToString())
    np.savez(data, **samples)
    command = ["build", str(file), "--calibration", str(data), "--quiet"]

    assert main([*command, "--analyze"]) == 0
    text = capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz", "m.onnx"]
    document = yaml.safe_load(text)
    assert set(document) == {"layers"} and document["layers"]
    assert main([*command, "--analyze", "--json"]) == 0
    analysis = json.loads(capsys.readouterr().out)
    assert analysis["recipe"] == document

    plain, spared = tmp_path / "plain.bank", tmp_path / "spared.bank"
    (tmp_path / "r.yaml").write_text(text)
    assert main([*command, "-o", str(plain)]) == 0
    assert main([*command, "-o", str(spared), "--recipe", str(tmp_path / "r.yaml")]) == 0
    before, after = Bank.open(plain), Bank.open(spared)
    for name, settings in document["layers"].items():
        assert list(after.layer(name).levels) == settings["levels"]
    for change in analysis["changes"]:
        level = change["level"]
        assert change["bytes_before"] == before.weight_bytes(level)
        assert change["bytes_after"] == pytest.approx(after.weight_bytes(level), rel=0.01)
        column = LOW.index(level)
        assert change["error_before"] == pytest.approx(before.sensitivity()[:, column].sum())
        assert change["error_after"] < change["error_before"]
    top = max(change["level"] for change in analysis["changes"])
    assert after.weight_bytes(top) <= 1.1 * before.weight_bytes(top)

    # The layers that lack a level already still lack it in what a second analysis proposes.
    assert main([*command, "--analyze", "--recipe", str(tmp_path / "r.yaml")]) == 0
    again = yaml.safe_load(capsys.readouterr().out)["layers"]
    for name, settings in document["layers"].items():
        assert set(again[name]["levels"]) <= set(settings["levels"])


def test_a_level_that_saves_no_bytes_is_left_out_for_free(tmp_path):
    """A depthwise layer of nine columns takes no fewer bytes at level 2 than at level 4."""
    nodes = [
        node("Conv", ["x", "dw"], ["d"], "depthwise", group=64, pads=[1, 1, 1, 1]),
        node("Relu", ["d"], ["r"]),
        node("Conv", ["r", "pw"], ["y"], "pointwise"),
    ]
    constants = {"dw": weights(64, 1, 3, 3), "pw": weights(96, 64, 1, 1, seed=1)}
    shapes = {"x": (FLOAT, ["n", 64, 6, 6])}, {"y": (FLOAT, ["n", 96, 6, 6])}
    bank = tmp_path / "d.bank"
    model = models.model(nodes, *shapes, constants)
    build_bank(model, bank, calibration={"x": weights(16, 64, 6, 6)}, progress=False)
    free = [each for each in analyze(Bank.open(bank)).findings if each.extra_bytes <= 0]
    assert {(each.layer, each.level) for each in free} == {("depthwise", 2)}
    assert np.isfinite(free[0].error_per_mib)


def test_analysis_with_a_name_leaves_the_bank(samples, tmp_path, capsys):
    file = tmp_path / "m.onnx"
    file.write_bytes(chain().SerializeToString())
    out = tmp_path / "a.bank"
    assert main(["build", str(file), "--analyze", "--quiet", "--levels", "4", "-o", str(out)]) == 0
    printed = capsys.readouterr()
    assert yaml.safe_load(printed.out) == {"layers": {}}
    assert "None stands out" in printed.out
    assert verify(out).ok


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "a.bank", "--prune-tau", "1.5"], "prune_tau is '1.5', must be a number from 0"),
        (["-o", "a.bank", "--recipe", "r.yaml"], "'no' fits no layer of the model; its layers are"),
    ],
)
def test_command_refuses_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.onnx").write_bytes(chain().SerializeToString())
    (tmp_path / "r.yaml").write_text("layers: {'no': {levels: [8]}}")
    code = main(["build", "m.onnx", "--quiet", "--levels", "8", *arguments])
    error = capsys.readouterr().err.splitlines()
    assert code == RecipeError.exit_code and message in error[-1]
    assert len([line for line in error if "without calibration" not in line]) == 1
    assert not (tmp_path / "a.bank").exists()
