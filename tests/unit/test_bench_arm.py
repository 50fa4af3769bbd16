"""What the benchmarks make of counts, disassembly and results; nothing is measured here."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.arm.counts import PARTS, Block, Frame, median_run, parse_frames, part_of, spans
from benchmarks.arm.table import table, to_markdown
from benchmarks.kernels.mca import CORES, Loop, bound_cycles, find_loops

LIBRARY = "/site/bapq_edge/engine/libbapq.so"
KERNEL = Frame("tile_L4", "src/kernels/neon.c")
ITEM = Frame("multiply_item", "src/conv.c")


def test_counts_are_split_at_the_marks():
    lines = [
        "block 7 10 /usr/bin/python3.11\n",
        "mark\n",
        "block 3 1f0 /a path/lib.so\n",
        "block 4 1f0 /a path/lib.so\n",
        "mark\n",
        "block 9 0 -\n",
    ]
    assert list(spans(lines)) == [
        Counter({Block("/usr/bin/python3.11", 0x10): 7}),
        Counter({Block("/a path/lib.so", 0x1F0): 7}),
    ]


def test_inlined_functions_come_with_those_they_are_in():
    lines = [
        "0x0000000000001000",
        "vaddq_s32",
        "/zig/arm_neon.h:12",
        "tile_L8",
        "/src/native/src/kernels/neon.c:99 (discriminator 3)",
        "0x0000000000002000",
        "??",
        "??:0",
    ]
    assert parse_frames(lines) == {
        0x1000: (
            Frame("vaddq_s32", "/zig/arm_neon.h"),
            Frame("tile_L8", "/src/native/src/kernels/neon.c"),
        ),
        0x2000: (Frame("??", "??"),),
    }


@pytest.mark.parametrize(
    "path, frames, part",
    [
        ("/site/onnxruntime/capi/onnxruntime_pybind11_state.so", (), "runtime"),
        ("/usr/bin/python3.11", (), "around"),
        (LIBRARY, (Frame("vmull_s8", "arm_neon.h"), KERNEL), "kernels"),
        (LIBRARY, (Frame("quantize_row", "src/kernels/neon.c"),), "inputs"),
        (LIBRARY, (Frame("fill_quantized", "src/conv.c"), ITEM), "inputs"),
        (LIBRARY, (Frame("bapq_image_strip", "src/image.c"),), "inputs"),
        (LIBRARY, (Frame("multiply_tile", "src/conv.c"), ITEM), "operators"),
    ],
)
def test_code_is_told_by_what_it_is_for(path, frames, part):
    assert part_of(path, frames) == part
    assert part in PARTS


def test_the_median_is_a_run_that_was():
    runs = [{"kernels": total, "around": 0} for total in (5, 1, 9)]
    assert median_run(runs) == {"kernels": 5, "around": 0}


def test_a_table_has_a_row_for_each_model_and_a_line_for_what_failed():
    parts = {**dict.fromkeys(PARTS, 0), "kernels": 2_000_000, "runtime": 500_000}
    common = {"cpu": "cortex-a72", "model": "net"}
    cells = [
        {**common, "engine": "fp32", "version": "ONNX Runtime 1", "parts": parts},
        {**common, "engine": "ncnn", "failed": "not installed: ncnn"},
        {**common, "engine": "4", "version": "bapq-edge", "parts": parts},
    ]
    text = to_markdown(cells, {"net": "Net 224"})
    assert "| Net 224 | 2.50 |  | 2.50 |" in text
    assert "| Net 224 | ours 4 | 2.00 | 0.00 | 0.00 | 0.50 | 0.00 |" in text
    assert "- Net 224, ncnn: not installed: ncnn" in text


def test_a_table_is_markdown():
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


DISASSEMBLY = """
neon.o:\tfile format elf64-littleaarch64

0000000000000000 <tile>:
       0:      \tmov\tx0, #0
       4:      \tldr\tq0, [x1], #16
       8:      \tldp\tq1, q2, [sp, #32]
       c:      \tsmull\tv3.8h, v0.8b, v1.8b
      10:      \tsmlal2\tv3.8h, v0.16b, v1.16b
      14:      \tcbz\tx3, 0x18 <tile+0x18>
      18:      \tsubs\tx2, x2, #1
      1c:      \tb.ne\t0x4 <tile+0x4>
      20:      \tb.lt\t0x0 <tile>
      24:      \tret

0000000000000040 <dots>:
      40:      \tsdot\tv0.4s, v1.16b, v2.4b[1]
      44:      \tfmla\tv4.4s, v5.4s, v6.4s
      48:      \tcbnz\tx0, 0x40 <dots>
"""


def test_innermost_loops_are_found_in_disassembly():
    first, second = find_loops(DISASSEMBLY)
    assert (first.symbol, len(first.body), first.loads, first.spills) == ("tile", 7, 2, 1)
    assert (first.products, first.uses_dot) == (16, False)
    assert (second.symbol, second.products, second.uses_dot) == ("dots", 16, True)


def test_a_loop_takes_no_less_than_its_loads_and_multiplications():
    loop = Loop("f", (*["ldr q0, [x0]"] * 6, *["smlal v0.8h, v1.8b, v2.8b"] * 4, "b.ne .L"))
    assert bound_cycles(loop, CORES["cortex-a72"]) == 6
    assert bound_cycles(loop, CORES["neoverse-n1"]) == 4
    dots = Loop("f", ("sdot v0.4s, v1.16b, v2.16b", "fmla v3.4s, v4.4s, v5.4s", "ldr q0, [x0]"))
    assert bound_cycles(dots, CORES["neoverse-n1"]) == 1
