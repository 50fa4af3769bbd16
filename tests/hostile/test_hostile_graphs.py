"""Graphs that lie: each is refused by name, at the open or at the run, and reaches no other bank.

The operators' own arithmetic meets thousands more in `tests/native`, under sanitizers.
"""

from __future__ import annotations

import itertools
import random
import threading

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bapq_edge import Session
from bapq_edge.bank.graph_file import check_graph
from bapq_edge.bank.verify import verify
from bapq_edge.engine.graph import RUN_INPUT
from bapq_edge.errors import BankFormatError, BapqError, ExecutionError, RunInputError
from support.banks import NO_CLIP, graph_bytes, node, random_codes, write_bank
from support.operators import Conv, conv_attributes, describe

LINEAR = {"use_bias": 1, "clip_low": -NO_CLIP, "clip_high": NO_CLIP}
IMAGE = conv_attributes(Conv(8, 24, (10, 10), (3, 3)))
WICKED = (0, -1, 1 << 20, 1 << 21, 300, 1 << 31, (1 << 32) + 1, 1 << 32, 1 << 62)
WICKED += ((1 << 63) - 1, -(1 << 63))


def bank_of(path, nodes, x_shape, x_type=TensorProto.FLOAT, edit=None, rows=24, columns=72):
    """A bank with one layer of 24 rows and 72 columns, a convolution's or a product's."""
    model = onnx.load_from_string(graph_bytes(nodes, x_shape, None, x_type))
    if edit is not None:
        edit(model)
    codes = random_codes(np.random.default_rng(1), rows, columns, {4: 32, 2: 64, 1: 128}, True)
    operators = ("Conv", "MatMul", "Gemm")
    return write_bank(
        path,
        model.SerializeToString(),
        [("layer", operators, codes, describe(rows, columns, 32, True))],
    )


def run(bank, x):
    with Session(bank, level=8, threads=1) as session:
        return session.run(None, {"x": x})[0]


def image(*shape):
    return np.ones(shape, np.float32)


# ---- attributes and shapes ----


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"pad_top": 5, "pad_bottom": 5}, "it must be flat"),
        ({"kernel_h": 3, "kernel_w": 3}, "it must be flat"),
        ({"pad_top": 5000, "pad_bottom": 300}, "it must be flat"),
        (
            {"pad_left": (1 << 63) - 1},
            "is 9223372036854775807, it can be from 0 to 1048576",
        ),
    ],
)
def test_a_window_over_a_line_is_flat(tmp_path, changed, words):
    flat = IMAGE | {"kernel_h": 1, "kernel_w": 9} | changed
    bank = bank_of(tmp_path / "m.bank", [node("Conv", "x", "y", **flat)], [2, 8, 30])
    with pytest.raises(RunInputError, match=words):
        run(bank, image(2, 8, 30))


@pytest.mark.parametrize("odd", [5, 7, 0x1234567])
def test_a_window_whose_area_wraps_around(tmp_path, odd):
    width = 9 * pow(odd, -1, 1 << 64) % (1 << 64)
    width -= (width >> 63) << 64
    wraps = IMAGE | {"kernel_h": odd, "kernel_w": width}
    bank = bank_of(tmp_path / "m.bank", [node("Conv", "x", "y", **wraps)], [1, 8, 10, 10])
    with pytest.raises(RunInputError, match="the convolution's kernel_"):
        run(bank, image(1, 8, 10, 10))


@pytest.mark.parametrize("name", [name for name in IMAGE if "clip" not in name])
def test_every_attribute_is_bounded_before_it_is_used(tmp_path, name):
    rng = random.Random(name)
    for number, value in enumerate(rng.sample(WICKED, 4)):
        attributes = IMAGE | {name: value}
        path = tmp_path / f"{number}.bank"
        bank = bank_of(path, [node("Conv", "x", "y", **attributes)], [1, 8, 10, 10])
        try:
            assert run(bank, image(1, 8, 10, 10)).shape[1] == 24
        except (RunInputError, ExecutionError) as error:
            assert "\n" not in str(error)


def test_hundreds_of_random_graphs_answer_or_are_refused_by_name(tmp_path):
    rng = random.Random(5)
    shapes = ([1, 8, 10, 10], [2, 8, 30], [3, 72], [1, 2, 72], [72], [], [0, 72], [1, 8, 0, 9])
    answered = 0
    for number in range(60):
        operator = rng.choice(["Conv", "MatMul", "Gemm", "Gather"])
        attributes = dict(IMAGE if operator == "Conv" else {"layer": 0, **LINEAR})
        for name in rng.choices([n for n in attributes if "clip" not in n], k=rng.randrange(3)):
            attributes[name] = rng.choice(WICKED)
        shape, wide = rng.choice(shapes), operator == "Gather"
        bank = bank_of(
            tmp_path / f"{number}.bank",
            [node(operator, "x", "y", **attributes)],
            [None] * len(shape),
            TensorProto.INT64 if wide else TensorProto.FLOAT,
        )
        try:
            run(bank, np.ones(shape, np.int64 if wide else np.float32))
            answered += 1
        except BapqError as error:
            assert "\n" not in str(error)
    assert answered > 2


# ---- tickets ----


def with_ticket(made_by, ticket):
    """The operator takes a ticket that the graph made."""

    def edit(model):
        for each in made_by:
            model.graph.node.insert(0, each)
        model.graph.node[-1].input[1] = ticket

    return edit


def constant(name, value):
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value)))


TICKETS = {
    "a constant": [constant("t", np.int64(1 << 32 | 1))],
    "an empty constant": [constant("t", np.zeros(0, np.int64))],
    "of another type": [constant("t", np.float32(1))],
    "one number in an axis": [
        helper.make_node("Reshape", [RUN_INPUT, "axis"], ["t"]),
        constant("axis", np.array([1], np.int64)),
    ],
    "empty at run time": [
        helper.make_node("NonZero", ["nothing"], ["t"]),
        helper.make_node("Sub", ["x", "x"], ["nothing"]),
    ],
    "the next number": [
        helper.make_node("Add", [RUN_INPUT, "one"], ["t"]),
        constant("one", np.int64(1)),
    ],
}


@pytest.mark.parametrize("made_by", TICKETS.values(), ids=TICKETS)
def test_a_ticket_that_no_run_was_given(tmp_path, made_by):
    nodes = [node("MatMul", "x", "y", layer=0, **LINEAR)]
    bank = bank_of(tmp_path / "m.bank", nodes, ["n", 72], edit=with_ticket(made_by, "t"))
    with pytest.raises((RunInputError, ExecutionError, BankFormatError)) as caught:
        run(bank, image(2, 72))
    assert "\n" not in str(caught.value)


def test_a_ticket_of_another_session_is_refused(tmp_path):
    """Even where a graph is told the number of a run that is open in another session."""
    linear = [node("MatMul", "x", "y", layer=0, **LINEAR)]
    victim = bank_of(tmp_path / "victim.bank", linear, ["n", 72])

    def edit(model):
        model.graph.input.append(helper.make_tensor_value_info("t", TensorProto.INT64, []))
        model.graph.node[-1].input[1] = "t"

    thief = bank_of(tmp_path / "thief.bank", linear, ["n", 72], edit=edit)
    with Session(victim, level=8) as one, Session(thief, level=8) as other:
        store = one.internals.store
        open_run = store.begin_run()
        feed = {"x": image(1, 72), "t": open_run.ticket}
        with pytest.raises((RunInputError, ExecutionError), match="no open run of this bank"):
            other.run(None, feed)
        store.end_run(open_run)
        assert one.run(None, {"x": image(1, 72)})[0].shape == (1, 24)


def test_tickets_cannot_be_guessed(tmp_path):
    nodes = [node("MatMul", "x", "y", layer=0, **LINEAR)]
    with Session(bank_of(tmp_path / "m.bank", nodes, ["n", 72]), level=8) as session:
        store, seen = session.internals.store, []
        for _ in range(50):
            open_run = store.begin_run()
            seen.append(int(open_run.ticket))
            store.end_run(open_run)
    assert len(set(seen)) == 50
    assert len({a - b for a, b in itertools.pairwise(seen)}) == 49


# ---- what a graph may hold ----


def external(model):
    tensor = TensorProto(name="b", data_type=TensorProto.FLOAT, dims=[24])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="etc/secret")
    model.graph.initializer.append(tensor)
    model.graph.node[-1].output[0] = "p"
    model.graph.node.append(helper.make_node("Add", ["p", "b"], ["y"]))


def external_in_a_body(model):
    body = helper.make_graph([], "body", [], [helper.make_tensor_value_info("o", 1, [24])])
    tensor = body.initializer.add(name="o", data_type=TensorProto.FLOAT, dims=[24])
    tensor.external_data.add(key="location", value="etc/secret")
    model.graph.node.append(
        helper.make_node("If", ["c"], ["z"], then_branch=body, else_branch=body)
    )


def foreign_domain(model):
    model.opset_import.append(helper.make_opsetid("evil.corp", 1))


def foreign_node(model):
    model.graph.node.append(helper.make_node("Custom", ["x"], ["z"], domain="evil.corp"))


def function(model):
    model.functions.append(
        helper.make_function("bapq", "MatMul", ["a"], ["b"], [], [helper.make_opsetid("", 13)])
    )


def training(model):
    model.training_info.add()


def sparse_external(model):
    tensor = model.graph.sparse_initializer.add()
    tensor.values.data_location = TensorProto.EXTERNAL


HOSTILE = {
    external: "has external data in a tensor",
    external_in_a_body: "has external data in a tensor",
    sparse_external: "has external data in a tensor",
    foreign_domain: 'has operators of domain "evil.corp", allowed are',
    foreign_node: 'has operators of domain "evil.corp", allowed are',
    function: "has a function in a model",
    training: "has training information in a model",
}


@pytest.mark.parametrize(
    ("edit", "words"), HOSTILE.items(), ids=lambda v: getattr(v, "__name__", "")
)
def test_what_no_bank_has_is_refused_at_open_and_by_verify(tmp_path, monkeypatch, edit, words):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/secret").write_bytes(b"\x01" * 96)
    monkeypatch.chdir(tmp_path)  # as a service's working directory may be the root folder
    nodes = [node("MatMul", "x", "y", layer=0, **LINEAR)]
    bank = bank_of(tmp_path / "m.bank", nodes, ["n", 72], edit=edit)
    with pytest.raises(BankFormatError, match=words) as caught:
        Session(bank)
    assert "graph/main.onnx" in str(caught.value)
    report = verify(bank)
    assert not report.ok and words in str(report)


def test_a_file_of_onnx_runtimes_own_format_is_no_graph():
    with pytest.raises(BankFormatError, match="is no ONNX model"):
        check_graph(b"\x18\0\0\0ORTM" + bytes(40), "graph/main.onnx")


def test_any_bytes_are_a_graph_or_are_refused():
    """The same answer as protobuf's own: what it cannot read is refused."""
    nodes = [node("MatMul", "x", "y", layer=0, **LINEAR)]
    whole = graph_bytes(nodes, ["n", 72], ["n", 24])
    check_graph(whole, "m.onnx")
    rng = random.Random(3)
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        try:
            check_graph(bytes(data), "m.onnx")
        except BankFormatError as error:
            assert "\n" not in str(error)
            continue
        found = onnx.ModelProto()
        try:
            found.ParseFromString(bytes(data))
        except Exception:  # text that is no UTF-8, which ONNX Runtime refuses in its turn
            continue
        assert not found.functions and not found.training_info
        assert not any(t.external_data or t.data_location for t in found.graph.initializer)


def test_nesting_has_an_end():
    data = b""
    for _ in range(40):
        attribute = b"\x32" + size(data) + data  # g
        node_ = b"\x2a" + size(attribute) + attribute
        data = b"\x0a" + size(node_) + node_
    with pytest.raises(BankFormatError, match="is nested deeper than"):
        check_graph(b"\x3a" + size(data) + data, "m.onnx")


def size(data):
    length, out = len(data), b""
    while length > 127:
        out, length = out + bytes([length & 127 | 128]), length >> 7
    return out + bytes([length])


def test_sessions_side_by_side_keep_to_their_own_weights(tmp_path):
    """Operators are given their store while another thread opens another session."""
    nodes = [node("MatMul", "x", "y", layer=0, **LINEAR)]
    banks = [bank_of(tmp_path / f"{i}.bank", nodes, ["n", 72]) for i in range(2)]
    x, failures = image(1, 72), []
    expected = run(banks[0], x)

    def work(bank):
        try:
            for _ in range(10):
                np.testing.assert_array_equal(run(bank, x), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(banks[i % 2],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
