"""The manifest: what it accepts is what it writes, and every message names key, value and rule."""

from __future__ import annotations

import json
import random
import sys

import numpy as np
import pytest

from bapq_edge.bank.consistency import parse_manifest
from bapq_edge.bank.fields import printable, safe_name
from bapq_edge.bank.manifest import digest_in, seal
from bapq_edge.errors import (
    BankError,
    BankFormatError,
    BankIntegrityError,
    BankPathError,
    BankVersionError,
)
from support.bank_samples import PRUNED, write_bank
from support.hostile import sealed

HUGE = 1 << 60


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("manifest") / "sample.bank"
    write_bank(path)
    return json.loads((path / "manifest.json").read_bytes())


def changed(document, path, value):
    """A copy with the value at a dotted path replaced, or removed when it is `...`."""
    copy = json.loads(json.dumps(document))
    *parents, last = path.split("/")
    target = copy
    for key in parents:
        target = target[int(key) if isinstance(target, list) else key]
    if isinstance(target, list):
        last = int(last)
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return copy


def test_any_key_order_is_read_and_the_canonical_one_is_written(document):
    manifest = parse_manifest(sealed(document))
    data = manifest.to_json()
    assert data == json.dumps(document, sort_keys=True, indent=2).encode() + b"\n"
    assert parse_manifest(data) == manifest


def test_calibration_is_optional_and_kept(document):
    assert parse_manifest(sealed(document)).calibration is None
    calibration = {"samples": 3, "blake2b": "0" * 32}
    manifest = parse_manifest(sealed(document | {"calibration": calibration}))
    assert manifest.calibration.samples == 3
    assert json.loads(manifest.to_json())["calibration"] == calibration


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("surprise", 1, "unknown key surprise, allowed are batched, boundary"),
        ("batched", {"inputs": [], "outputs": ["y"]}, "batched.inputs is (), must be 1 to 1024 na"),
        (
            "batched",
            {"inputs": ["x"], "outputs": ["y", "y"]},
            "batched.outputs is ('y', 'y')",
        ),
        ("batched", {"inputs": ["x"]}, "key batched.outputs is missing"),
        ("layers/1/surprise", 1, "unknown key layers[1].surprise, allowed are chunk_rows"),
        ("planes/p5", {}, "unknown key planes.p5, allowed are f32, m1, p4, r8, s1"),
        ("layers/0/scale_columns/8", 32, "layers[0].scale_columns is for levels [1, 2, 4, 8]"),
        ("layers", ..., "key layers is missing"),
        ("model/blake2b", ..., "key model.blake2b is missing"),
        ("kept_in_float", ..., "key kept_in_float is missing"),
        ("planes/p4", ..., "planes is ['f32', 'm1', 'r8', 's1'], must be ['f32', 'm1', 'p4'"),
        ("calibration", None, "calibration is null, must be an object"),
        ("layers", {}, "layers is an object of 0 keys, must be a list"),
        ("layers", [], "layers is empty, must be at least one layer"),
        ("model", [], "model is a list of 0, must be an object"),
        ("layers/0/rows", True, "layers[0].rows is true, must be an integer"),
        ("layers/0/rows", 1.0, "layers[0].rows is 1.0, must be an integer"),
        ("layers/0/rows", "1", 'layers[0].rows is "1", must be an integer'),
        ("layers/0/rows", 0, "layers[0].rows is 0, must be an integer from 1 to"),
        ("layers/0/rows", HUGE, f"layers[0].rows is {HUGE}, must be an integer from 1 to"),
        ("layers/0/rows", 2, "dropped_bias is absent, must be there"),
        ("layers/0/stored_rows", ..., "key layers[0].stored_rows is missing"),
        ("layers/0/stored_rows", 0, "layers[0].stored_rows is 0, must be an integer from 1 to"),
        ("layers/0/stored_rows", 2, "layers[0].stored_rows is 2, must be from 1 to 1"),
        ("layers/0/reordered", ..., "key layers[0].reordered is missing"),
        ("layers/0/reordered", 0, "layers[0].reordered is 0, must be true or false"),
        ("layers/0/reordered", True, "row_order is absent, must be there"),
        ("row_order", {}, "key row_order.file is missing"),
        ("dropped_bias", None, "dropped_bias is null, must be an object"),
        ("layers/0/columns", 1 << 25, "must be an integer from 1 to 16777216"),
        ("layers/0/chunk_rows", 8, "layers[0].chunk_rows is 8, must be an integer from 16"),
        ("layers/0/chunk_rows", 24, "layers[0].chunk_rows is 24, must be an integer from 16"),
        ("layers/1/first_chunk", 2, "layers[1].first_chunk is 2, must be 1"),
        ("layers/0/has_bias", 1, "layers[0].has_bias is 1, must be true or false"),
        ("layers/0/looped", False, "layers[0].looped is false, must be true, or absent"),
        ("layers/0/looped", 1, "layers[0].looped is 1, must be true or false"),
        ("layers/0/residual_steps", 7, "is 7, must be an integer from 8 to 16"),
        ("layers/0/residual_steps", 17, "is 17, must be an integer from 8 to 16"),
        ("layers/0/scale_columns/4", 48, "layers[0].scale_columns.4 is 48, must be an integer"),
        ("layers/0/scale_columns/4", ..., "scale_columns is for levels [1, 2], must be [1, 2, 4]"),
        ("layers/0/method", ..., "key layers[0].method is missing"),
        ("layers/0/method/4", "nearby", 'method.4 is "nearby", must be one of nearest, compen'),
        ("layers/0/method/4", None, "method.4 is null, must be one of nearest, compensated"),
        ("layers/0/method/4", ..., "method is for levels [1, 2, 8], must be [1, 2, 4, 8]"),
        ("layers/0/method/32", "nearest", "method is for levels [1, 2, 4, 8, 32], must be [1, 2"),
        ("layers/0/method/3", "nearest", "unknown key layers[0].method.3"),
        ("layers/0/relative_error/8", -0.5, "relative_error.8 is -0.5, must be a finite number"),
        ("layers/0/relative_error/8", "0", 'relative_error.8 is "0", must be a number'),
        ("layers/0/relative_error/8", ..., "layers[0].method is for levels [1, 2, 4, 8], must be"),
        (
            "layers/0/relative_error",
            {},
            "layers[0].relative_error is for levels [], must be for one",
        ),
        (
            "levels",
            [32, 8, 4, 2],
            "layers[0].relative_error is for levels [1, 2, 4, 8, 32], must be",
        ),
        ("layers/0/name", "a/b", 'layers[0].name is "a/b", must be 1 to 200 letters'),
        ("layers/0/name", "..", 'layers[0].name is "..", must be 1 to 200 letters'),
        ("layers/0/name", "manifest.json", "layers[0].name is"),
        ("layers/0/name", "n" * 201, "layers[0].name is"),
        ("layers/1/name", "layer0", 'layers[1].name is "layer0", must be unlike layers[0].name'),
        ("layers/0/operators", [], "layers[0].operators is [], must be one or more, each once"),
        ("layers/0/operators", ["Gemm", "Gemm"], "must be one or more, each once"),
        ("layers/0/operators", ["Conv", "DepthwiseConv"], "must be DepthwiseConv alone"),
        ("layers/0/operators/0", "Softmax", "must be one of MatMul, Gemm, Conv, Depth"),
        ("levels", [4, 8], "levels is [4, 8], must be one or more, highest first"),
        ("levels", [8, 8, 4], "levels is [8, 8, 4], must be one or more, highest first"),
        ("levels", [], "levels is [], must be one or more, highest first"),
        ("levels/0", 16, "levels[0] is 16, must be one of 32, 8, 4, 2, 1"),
        ("levels/4", True, "levels[4] is true, must be one of 32, 8, 4, 2, 1"),
        ("levels", [8, 4], "planes is ['f32', 'm1', 'p4', 'r8', 's1'], must be ['p4', 'r8']"),
        ("graph/bytes", -1, "graph.bytes is -1, must be an integer from 0 to 9007199254740991"),
        ("graph/blake2b", "AB" * 16, "must be 32 lower-case hexadecimal digits"),
        ("graph/file", "graph/other.onnx", "graph.file is graph/other.onnx, must be graph/main"),
        ("sensitivity", ..., "key sensitivity is missing"),
        ("sensitivity/file", "tables/p4.npy", "sensitivity.file is tables/p4.npy, must be tables/"),
        ("sensitivity/bytes", 1, "sensitivity.bytes is 1, must be 308"),
        ("planes/p4/bytes", 1, "planes.p4.bytes is 1, must be 17536"),
        ("planes/p4/file", "planes/r8.bin", "planes.p4.file is planes/r8.bin, must be planes/p4"),
        ("planes/p4/chunks/bytes", 1, "planes.p4.chunks.bytes is 1, must be 272"),
        ("planes/p4/digests/bytes", HUGE, "planes.p4.digests.bytes is 1152921504606846976, must"),
        ("kept_in_float", [{}], "key kept_in_float[0].name is missing"),
        ("model/producer", "two\nlines", 'model.producer is "two\\nlines", must be at most 1024'),
        ("model/producer", "\ud800", 'model.producer is "\\ud800", must be at most 1024'),
        ("format", "zip", 'format is "zip", must be "bapq-bank"'),
    ],
)
def test_every_deviation_is_named(document, path, value, message):
    with pytest.raises(BankFormatError) as caught:
        parse_manifest(sealed(changed(document, path, value)), "m.bank/manifest.json")
    assert str(caught.value).startswith("m.bank/manifest.json")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


# PRUNED: reordered rows are 40 + 19 + 37, dropped ones with a bias 20 + 18.
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers/0/operators/0": "Gather"}, "layers[0].reordered is true, must be false with a"),
        ({"layers/1/operators": ["MatMul", "Gather"]}, "stored_rows is 30, must be from 50 to 50"),
        ({"layers/0/stored_rows": 41}, "layers[0].stored_rows is 41, must be from 1 to 40"),
        ({"layers/0/reordered": False}, "row_order.bytes is 512, must be 352"),
        ({"layers/5/reordered": True}, "row_order.bytes is 512, must be 540"),
        ({"layers/1/rows": 51}, "dropped_bias.bytes is 280, must be 284"),
        ({"layers/2/has_bias": True}, "dropped_bias.bytes is 280, must be 360"),
        (
            {"layers/0/rows": 1 << 30},
            "layers[0].rows is 1073741824, must be within 4194304 rows of",
        ),
        ({"layers/2/rows": 1 << 22}, "layers[2].rows is 4194304, must be within 4194304 rows of"),
        ({"row_order": ...}, "row_order is absent, must be there"),
        ({"dropped_bias": ...}, "dropped_bias is absent, must be there"),
        (
            {f"layers/{i}/reordered": False for i in (0, 3, 4)},
            "row_order is there, must be absent",
        ),
        (
            {"row_order/file": "tables/rows.npy"},
            "row_order.file is tables/rows.npy, must be tables",
        ),
        ({"dropped_bias/bytes": 0}, "dropped_bias.bytes is 0, must be 280"),
    ],
    ids=str,
)
def test_every_deviation_of_rows_is_named(tmp_path, changes, message):
    write_bank(tmp_path / "m.bank", PRUNED)
    document = json.loads((tmp_path / "m.bank/manifest.json").read_bytes())
    for path, value in changes.items():
        document = changed(document, path, value)
    with pytest.raises(BankFormatError) as caught:
        parse_manifest(sealed(document))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("rows", [1 << 30, (1 << 24) + 1])
def test_more_chunks_than_a_table_may_have_are_refused(document, rows):
    big = changed(changed(document, "layers/0/rows", rows), "layers/0/stored_rows", rows)
    with pytest.raises(BankFormatError, match=f"is {rows}, must be within 1048576 chunks"):
        parse_manifest(sealed(big))


@pytest.mark.parametrize(
    "file",
    [
        "/etc/passwd",
        "../other/p4.bin",
        "planes/../../p4.bin",
        "planes\\p4.bin",
        "planes/p4\0.bin",
        "planes/./p4.bin",
        "planes//p4.bin",
        "planes/..",
        "p4.bin",
        "",
    ],
)
def test_paths_that_can_leave_the_bank(document, file):
    with pytest.raises(BankPathError) as caught:
        parse_manifest(sealed(changed(document, "planes/p4/file", file)))
    assert f"planes.p4.file is {json.dumps(file)}" in str(caught.value)


@pytest.mark.parametrize("version", [0, 2, "1", True, None, 1.0])
def test_other_versions(document, version):
    other = document | {"format_version": version, "new_in_that_version": 1}
    with pytest.raises(BankVersionError, match=r"this program reads 1: rebuild"):
        parse_manifest(sealed(other))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "breaks off after 0 bytes"),
        (b"{}", "breaks off after 2 bytes"),
        (b"{\n", "is not JSON at character"),
        (b"[]\n", "format is a list of 0"),
        (b"\xff\n", "is not UTF-8 at byte 0"),
        (b"\xef\xbb\xbf{}\n", "is not JSON at character 0"),
        (b'{"a": 1, "a": 2}\n', 'key "a" stands twice in one object'),
        (b'{"a": NaN}\n', "holds NaN, which is not JSON"),
        (b'{"a": -Infinity}\n', "holds -Infinity, which is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}\n", "holds an integer of 5000 digits"),
        (b"[" * 100_000 + b"]" * 100_000 + b"\n", "is nested too deeply"),
        (b'{"a":' * 100_000 + b"\n", "is nested too deeply"),
        (b" " * (4 << 20) + b"{}\n", "has 4194307 bytes, allowed are 4194304"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_what_is_not_a_json_document(data, message):
    with pytest.raises(BankFormatError) as caught:
        parse_manifest(data)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_number_beyond_float_is_refused(document):
    data = sealed(changed(document, "layers/0/relative_error/8", 12345.5))
    with pytest.raises(BankFormatError, match="must be a finite number"):
        parse_manifest(seal(data.replace(b"12345.5", b"1e999")))


def test_the_digest_is_over_every_byte(document):
    data = parse_manifest(sealed(document)).to_json()
    assert parse_manifest(data).digest == json.loads(data)["digest"] == digest_in(data)[1]
    places = [(at, bit) for at in range(len(data)) for bit in range(8)]
    for at, bit in random.Random(1).sample(places, 1500):
        damaged = bytearray(data)
        damaged[at] ^= 1 << bit
        with pytest.raises(BankError):
            parse_manifest(bytes(damaged))
    words = "has BLAKE2b [0-9a-f]{64}, expected [0-9a-f]{64}: copy or build the bank again"
    with pytest.raises(BankIntegrityError, match=words):
        parse_manifest(data.replace(b'"residual_steps": 13', b'"residual_steps": 12'))
    with pytest.raises(BankIntegrityError):
        parse_manifest(data.replace(b'  "', b'   "', 1))


@pytest.mark.parametrize("digest", ["", "0" * 63, "A" * 64, 7, None, "\\u0030" + "0" * 63])
def test_a_digest_that_is_none(document, digest):
    data = sealed(document)
    written = json.dumps(digest).replace("\\\\", "\\").encode()
    stated = json.dumps(digest_in(data)[0]).encode()
    with pytest.raises(BankFormatError, match="digest is"):
        parse_manifest(data.replace(stated, written))


def test_a_digest_is_there(document):
    with pytest.raises(BankFormatError, match="key digest is missing"):
        parse_manifest(sealed(changed(document, "digest", ...)))


def test_chunks_larger_than_the_table_can_say_are_refused(document):
    big = changed(document, "layers/0/rows", 1 << 20)
    big = changed(big, "layers/0/stored_rows", 1 << 20)
    big = changed(big, "layers/0/columns", 1 << 24)
    big = changed(big, "layers/0/chunk_rows", 1 << 20)
    with pytest.raises(BankFormatError, match="a chunk would have 70368748371968 bytes"):
        parse_manifest(sealed(big))


def test_layout_is_aligned_contiguous_and_in_order(document):
    manifest = parse_manifest(sealed(document))
    for plane in manifest.planes:
        layout = manifest.chunk_layout(plane).astype([("offset", int), ("bytes", int), ("c", int)])
        assert len(layout) == manifest.chunk_count
        ends = layout["offset"] + layout["bytes"]
        assert not (layout["offset"] % 64).any()
        np.testing.assert_array_equal(layout["offset"], [0, *ends[:-1]])


def test_names_are_made_safe():
    assert safe_name("mini lm/v2:ä") == "mini_lm_v2_"
    assert safe_name("..") == "_.."
    assert safe_name("") == "_"
    assert safe_name("manifest.json") == "_manifest.json"
    assert len(safe_name("x" * 300)) == 200
    assert safe_name("resnet-50.v1_5") == "resnet-50.v1_5"
    assert printable("a\nb\u2028c\ud800") == "a?b?c?"
    assert sys.getsizeof(printable("x" * 9999)) < 2000
