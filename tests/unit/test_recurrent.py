"""LSTM, GRU and RNN nodes become layers, beside a Scan or one step, and give the same numbers."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import bapq_edge
from bapq_edge.bank.reader import Bank
from bapq_edge.planning.planner import Request, chunk_costs, plan, smallest_limit
from bapq_tools import build_bank
from bapq_tools.onnx_graph import recurrent_node
from bapq_tools.onnx_graph.fold import fold
from bapq_tools.onnx_graph.layers import find_layers
from support import onnx_models as models
from support.onnx_models import FLOAT, INT32, INT64, weights

node = helper.make_node
BATCH, INPUTS, HIDDEN = 3, 40, 36
OUTPUTS = ("y", "y_h", "y_c")


@pytest.fixture(autouse=True)
def _small_loops(monkeypatch):
    monkeypatch.setattr(recurrent_node, "MIN_LOOP_WEIGHTS", 1024)
    monkeypatch.setattr(recurrent_node, "MIN_STEP_WEIGHTS", 1024)


def constants_of(kind: str, directions: int = 1, bias: bool = True, peepholes: bool = False) -> Any:
    """Weights that keep the state from running away, by input of the node."""
    gates = recurrent_node.GATES[kind]
    found = {
        "w": weights(directions, gates * HIDDEN, INPUTS) / 6,
        "r": weights(directions, gates * HIDDEN, HIDDEN) / 6,
    }
    if bias:
        found["b"] = weights(directions, 2 * gates * HIDDEN) / 2
    if peepholes:
        found["p"] = weights(directions, 3 * HIDDEN) / 2
    return found


def recurrent(
    kind: str,
    *,
    steps: int = 5,
    open_sizes: bool = True,
    states: bool = True,
    lengths: tuple[int, ...] = (),
    outputs: tuple[str, ...] = OUTPUTS,
    opset: int = 17,
    direction: str = "forward",
    bias: bool = True,
    peepholes: bool = False,
    **attributes: Any,
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model of one node, and what to feed it."""
    directions = 2 if direction == "bidirectional" else 1
    constants = constants_of(kind, directions, bias, peepholes)
    feeds = {"x": weights(steps, BATCH, INPUTS)}
    if lengths:
        feeds["lengths"] = np.array(lengths, np.int32)
    if states:
        names = ("h", "c") if kind == "LSTM" else ("h",)
        feeds |= {n: weights(directions, BATCH, HIDDEN, seed=i) for i, n in enumerate(names)}
    places = ["x", "w", "r", "b", "lengths", "h", "c", "p"]
    places = [name if name in (constants | feeds) else "" for name in places]
    while not places[-1]:
        places.pop()
    named = [name if name in outputs else "" for name in OUTPUTS[: 3 if kind == "LSTM" else 2]]
    attributes |= {"hidden_size": HIDDEN, "direction": direction}
    inputs = {
        name: (INT32 if name == "lengths" else FLOAT, list(array.shape))
        for name, array in feeds.items()
    }
    if open_sizes:
        inputs["x"] = (FLOAT, ["steps", "batch", INPUTS])
    built = models.model(
        [node(kind, places, named, "layer", **attributes)],
        inputs,
        {name: (FLOAT, None) for name in named if name},
        constants,
        opset=opset,
    )
    return built, feeds


ANY_FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reverse": {"direction": "reverse"},
    "both_ways": {"direction": "bidirectional"},
    "no_states": {"states": False},
    "no_states_of_known_size": {"states": False, "open_sizes": False, "direction": "bidirectional"},
    "no_bias": {"bias": False},
    "lengths": {"lengths": (2, 5, 1)},
    "lengths_both_ways": {"lengths": (0, 5, 1), "direction": "bidirectional"},
    "clip": {"clip": 0.3, "direction": "bidirectional"},
    "all_answers_only": {"outputs": ("y",)},
    "last_state_only": {"outputs": ("y_h",)},
    "one_step": {"steps": 1, "open_sizes": False},
    "one_step_both_ways": {"steps": 1, "open_sizes": False, "direction": "bidirectional"},
    "one_step_with_lengths": {"steps": 1, "lengths": (1, 0, 1), "open_sizes": False},
    "opset_9": {"opset": 9, "direction": "bidirectional"},
    "opset_11": {"opset": 11, "lengths": (2, 5, 1)},
    "opset_18": {"opset": 18, "direction": "bidirectional"},
    "opset_22": {"opset": 22, "direction": "bidirectional"},
}
OWN_FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "LSTM": {
        "peepholes": {"peepholes": True, "direction": "bidirectional"},
        "input_forget": {"input_forget": 1},
        "peepholes_input_forget_clip": {"peepholes": True, "input_forget": 1, "clip": 0.3},
        "last_cell_only": {"outputs": ("y_c",)},
        "activations": {"activations": ["Sigmoid", "Relu", "Softsign"]},
        "one_step_with_peepholes": {"peepholes": True, "steps": 1, "open_sizes": False},
    },
    "GRU": {
        "linear_before_reset": {"linear_before_reset": 1, "direction": "bidirectional"},
        "linear_before_reset_clip": {"linear_before_reset": 1, "clip": 0.3},
        "one_step_linear": {"linear_before_reset": 1, "steps": 1, "open_sizes": False},
    },
    "RNN": {"relu": {"activations": ["Relu"]}, "relu_tanh": {
        "activations": ["Relu", "Tanh"], "direction": "bidirectional"}},
}  # fmt: skip
FORMS = [
    pytest.param(kind, form, id=f"{kind}-{name}")
    for kind, own in OWN_FORMS.items()
    for name, form in (ANY_FORMS | own).items()
]


@pytest.mark.parametrize("kind, form", FORMS)
def test_what_is_spelled_out_gives_the_same(kind: str, form: dict[str, Any]) -> None:
    source, feeds = recurrent(kind, **form)
    wanted = models.run(source, feeds)
    folded = fold(source)
    found = models.run(folded, feeds)
    assert [array.shape for array in found] == [array.shape for array in wanted]
    for have, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(have, want, rtol=0, atol=1e-5)
    present = set(models.operators(folded))
    assert kind not in present
    assert ("Scan" in present) == (form.get("steps", 5) > 1)
    plan = find_layers(folded)
    directions = 2 if form.get("direction") == "bidirectional" else 1
    products = 2 if kind == "GRU" and not form.get("linear_before_reset") else 1
    assert len(plan.layers) == 1 + directions * products
    assert not [kept for kept in plan.kept_in_float if kept.operator != "Gather"]
    assert sum(layer.weight.size for layer in plan.layers) == sum(
        array.size for name, array in constants_of(kind, directions).items() if name in "wr"
    )


BANKS = {
    "LSTM": {"states": False},
    "LSTM_both_ways": {"direction": "bidirectional", "outputs": ("y", "y_h")},
    "GRU": {"states": False},
    "GRU_linear_before_reset": {"linear_before_reset": 1, "direction": "reverse"},
    "RNN": {"states": False, "direction": "bidirectional"},
    "LSTM_one_step": {"steps": 1, "open_sizes": False},
}


@pytest.mark.parametrize("name", BANKS)
def test_a_bank_of_a_recurrent_model(name: str, tmp_path) -> None:
    kind = name.partition("_")[0]
    source, feeds = recurrent(kind, **BANKS[name])
    samples = {key: np.stack([weights(*a.shape, seed=n) for n in range(60)])
               for key, a in feeds.items()}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", bapq_edge.errors.UncalibratedWarning)
        report = build_bank(
            source, tmp_path / "m.bank", calibration=samples, levels=[32, 8, 4],
            workers=1, progress=False,
        )  # fmt: skip
    assert report.coverage == 1.0
    layers = Bank.open(tmp_path / "m.bank").manifest.layers
    assert layers[0].name == "layer_input"
    assert {layer.name.partition("_")[2] for layer in layers[1:]} <= {
        "state", "state_reverse", "state_gates", "state_candidate",
    }  # fmt: skip
    assert all(layer.relative_error[4] < 0.2 for layer in layers)
    sizes = [feeds] if "one_step" in name else [feeds, {"x": weights(9, BATCH, INPUTS)} | {
        key: array for key, array in feeds.items() if key != "x"}]  # fmt: skip
    with bapq_edge.Session(tmp_path / "m.bank", level=32) as session:
        for given in sizes:
            wanted = models.run(source, given)
            for level, error in ((32, 1e-5), (8, 0.02), (4, 0.2)):
                session.set_level(level)
                for have, want in zip(session.run(None, given), wanted, strict=True):
                    assert have.shape == want.shape
                    if level == 32:
                        np.testing.assert_allclose(have, want, rtol=0, atol=error)
                    assert np.linalg.norm(have - want) < error * np.linalg.norm(want)


def branching() -> onnx.ModelProto:
    """Two branches with the LSTM: one from zero, one from a given state, as of speech detectors."""
    parts = []
    for title, states in (("fresh", ["", ""]), ("going_on", ["h", "c"])):
        nodes = [
            node("Unsqueeze", ["x", "first"], [f"{title}_x"]),
            node("LSTM", [f"{title}_x", "w", "r", "b", "", *states],
                 [f"{title}_y", f"{title}_h"], title, hidden_size=HIDDEN),
            node("Squeeze", [f"{title}_h", "first"], [f"{title}_out"]),
        ]  # fmt: skip
        parts.append(models.graph(nodes, {}, {f"{title}_out": (FLOAT, None)}, name=title))
    return models.model(
        [node("If", ["is_new"], ["y"], then_branch=parts[0], else_branch=parts[1])],
        {
            "x": (FLOAT, [None, INPUTS]),
            "h": (FLOAT, [1, None, HIDDEN]),
            "c": (FLOAT, [1, None, HIDDEN]),
            "is_new": (TensorProto.BOOL, []),
        },
        {"y": (FLOAT, None)},
        constants_of("LSTM") | {"first": np.array([0])},
    )


def test_branches_share_their_weights_and_what_calibration_saw(tmp_path) -> None:
    """Samples go one way only, and not the one whose branch stands first."""
    samples = {
        "x": weights(80, 1, INPUTS),
        "h": weights(80, 1, 1, HIDDEN, seed=1),
        "c": weights(80, 1, 1, HIDDEN, seed=2),
        "is_new": np.zeros(80, bool),
    }
    source = branching()
    assert {"Scan", "LSTM"}.isdisjoint(models.operators(fold(source)))  # the added axis has size 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", bapq_edge.errors.UncalibratedWarning)
        build_bank(
            source, tmp_path / "m.bank", calibration=samples, levels=[32, 4], workers=1,
            progress=False,
        )  # fmt: skip
    layers = Bank.open(tmp_path / "m.bank").manifest.layers
    assert [layer.name for layer in layers] == ["fresh_input", "fresh_state"]
    with bapq_edge.Session(tmp_path / "m.bank", level=32) as session:
        for is_new in (True, False):
            feeds = {name: array[3] for name, array in samples.items()}
            feeds["is_new"] = np.array(is_new)
            (wanted,) = models.run(source, feeds)
            np.testing.assert_allclose(session.run(None, feeds)[0], wanted, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::bapq_edge.errors.UncalibratedWarning")
def test_a_node_in_a_loop(tmp_path) -> None:
    body = models.graph(
        [
            node("GRU", ["seen", "w", "r", "b", "", "state"], ["answers", "new"], "layer",
                 hidden_size=HIDDEN),
            node("Identity", ["go"], ["still"]),
        ],
        {"i": (INT64, []), "go": (TensorProto.BOOL, []), "state": (FLOAT, None)},
        {"still": (TensorProto.BOOL, []), "new": (FLOAT, None), "answers": (FLOAT, None)},
        constants_of("GRU"),
        name="body",
    )  # fmt: skip
    source = models.model(
        [
            node("Identity", ["x"], ["seen"]),
            node("Loop", ["times", "", "h"], ["y", "all"], body=body),
        ],
        {"x": (FLOAT, ["steps", BATCH, INPUTS]), "h": (FLOAT, [1, BATCH, HIDDEN])},
        {"y": (FLOAT, None), "all": (FLOAT, None)},
        {"times": np.array(2, np.int64)},
    )
    feeds = {"x": weights(4, BATCH, INPUTS), "h": weights(1, BATCH, HIDDEN)}
    build_bank(source, tmp_path / "m.bank", levels=[32], workers=1, progress=False)
    with bapq_edge.Session(tmp_path / "m.bank", level=32) as session:
        for have, want in zip(session.run(None, feeds), models.run(source, feeds), strict=True):
            np.testing.assert_allclose(have, want, rtol=0, atol=1e-5)


LEFT = {
    "activations": (
        {"activations": ["HardSigmoid", "Tanh", "Tanh"]},
        "activations that have parameters",
    ),
    "old_lengths": ({"opset": 9, "lengths": (2, 5, 1)}, "sequence lengths before opset 11"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_stays_a_node_says_why(name: str) -> None:
    form, reason = LEFT[name]
    source, _ = recurrent("LSTM", **form)
    source.graph.node.append(node("MatMul", ["x", "product"], ["z"]))
    source.graph.initializer.append(onnx.numpy_helper.from_array(weights(INPUTS, 64), "product"))
    source.graph.output.append(helper.make_tensor_value_info("z", FLOAT, None))
    (kept,) = find_layers(fold(source)).kept_in_float
    assert (kept.operator, kept.weights) == ("LSTM", 4 * HIDDEN * (INPUTS + HIDDEN + 2))
    assert kept.reason.startswith("recurrent operator")
    assert reason in kept.reason


def test_a_loop_must_be_worth_it(monkeypatch) -> None:
    """A single step pays with fewer weights."""
    monkeypatch.setattr(recurrent_node, "MIN_LOOP_WEIGHTS", 4 * HIDDEN * HIDDEN + 1)
    looped, _ = recurrent("LSTM")
    assert "LSTM" in models.operators(fold(looped))
    stepped, _ = recurrent("LSTM", steps=1, open_sizes=False)
    assert "LSTM" not in models.operators(fold(stepped))
    monkeypatch.setattr(recurrent_node, "MIN_STEP_WEIGHTS", 4 * HIDDEN * HIDDEN + 1)
    assert "LSTM" in models.operators(fold(stepped))


@pytest.mark.filterwarnings("ignore::bapq_edge.errors.UncalibratedWarning")
def test_a_budget_keeps_what_every_step_reads(tmp_path) -> None:
    """All other layers are streamed before that of the state is."""
    hidden, steps = 128, 20
    constants = {"w": weights(1, 4 * hidden, 512) / 20, "r": weights(1, 4 * hidden, hidden) / 20}
    constants |= {"v": weights(hidden, 16384) / 20, "u": weights(16384, 64) / 20}
    source = models.model(
        [
            node("LSTM", ["x", "w", "r"], ["", "last"], "layer", hidden_size=hidden),
            node("MatMul", ["last", "v"], ["wide"], "wide"),
            node("MatMul", ["wide", "u"], ["y"], "narrow"),
        ],
        {"x": (FLOAT, [steps, 1, 512])},
        {"y": (FLOAT, None)},
        constants,
    )
    bank, feeds = tmp_path / "m.bank", {"x": weights(steps, 1, 512)}
    build_bank(source, bank, levels=[8], workers=1, progress=False)
    layers = {layer.name: layer for layer in Bank.open(bank).manifest.layers}
    assert [name for name, layer in layers.items() if layer.looped] == ["layer_state"]
    costs = chunk_costs(Bank.open(bank))
    total, state = int(costs.level_bytes.sum()), layers["layer_state"].chunk_range
    with bapq_edge.Session(bank, level=8) as session:
        wanted = session.run(None, feeds)
    for limit in range(smallest_limit(costs, Request(level=8)), total, total // 8):
        found = plan(costs, Request(level=8, weight_bytes_limit=limit))
        room = limit - found.ring_bytes
        assert found.pinned[state].all() == (costs.level_bytes[state].sum() <= room)
    with bapq_edge.Session(bank, level=8, memory_budget=4 << 20) as session:
        for _ in range(2):
            np.testing.assert_array_equal(session.run(None, feeds)[0], wanted[0])
        assert session.stats().streamed_bytes > 0
