"""Counting a kernel's instructions: loops, paths, shares; and that the tables are of what was counted."""

import json

import pytest

from benchmarks import sass, tables
from benchmarks.common import RESULTS, pages

SOURCE = """\
for (outer) {
  for (inner) one();
  if (rare) two();
}
"""
DISASSEMBLY = """
.text.kernel:
	//## File "{file}", line 1
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   S2R R0, SR_TID.X ;
.L_x_1:
	//## File "{file}", line 2
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0030*/                   FADD R3, R3, R3 ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
	//## File "{file}", line 3
        /*0050*/                   BSSY B0, `(.L_x_2) ;
        /*0060*/              @!P1 BRA `(.L_x_3) ;
        /*0070*/                   FMUL R3, R3, R3 ;
        /*0080*/                   FMUL R3, R3, R3 ;
        /*0090*/                   FMUL R3, R3, R3 ;
.L_x_3:
        /*00a0*/                   BSYNC B0 ;
.L_x_2:
        /*00b0*/                   BRA.DIV UR4, `(.L_x_4) ;
	//## File "{file}", line 1
        /*00c0*/               @P2 BRA `(.L_x_0) ;
        /*00d0*/                   CALL.REL.NOINC `($helper) ;
        /*00e0*/                   EXIT ;
.L_x_4:
	//## File "{file}", line 3
        /*00f0*/                   WARPSYNC.ALL ;
        /*0100*/                   BRA `(.L_x_0) ;
$helper:
        /*0110*/                   MUFU.RCP R2, R2 ;
        /*0120*/                   RET.REL.NODEC R20 `(kernel) ;
.L_x_5:
        /*0130*/                   BRA `(.L_x_5);
"""


@pytest.fixture
def code(tmp_path):
    source = tmp_path / "kernel.cuh"
    source.write_text(SOURCE)
    ((name, text),) = sass.kernels(DISASSEMBLY.format(file=source))
    assert name == "kernel"
    return sass.Code(text)


def test_loops_are_known_by_their_source(code):
    inner, outer = (
        code.loops
    )  # neither what runs on forever at the end, nor the way of lanes that have parted
    assert inner.body < outer.body
    assert "for (inner)" in inner.place[0]
    assert "for (outer)" in outer.place[0]


def test_instructions_are_weighed_by_their_loops(code):
    once = 1 + 2 + 2  # before the loops; CALL and EXIT; the function that is called
    body = 1 + 2 + 3 + 1 + 1 + 1  # S2R; BSSY and its branch; the rare ones; BSYNC; BRA.DIV; back
    assert code.issued({"inner": 1, "outer": 1}) == once + body + 3
    assert code.issued({"inner": 7, "outer": 5}) == once + 5 * (body + 7 * 3)
    assert code.issued({"inner": 0}, one="outer") == body
    assert code.issued({}, one="inner") == 3


def test_what_is_seldom_reached_counts_by_its_share(code):
    trips = {"inner": 7, "outer": 5}
    without = code.issued(trips, {"if (rare)": 0})
    half = code.issued(trips, {"if (rare)": 0.5})
    assert without < half < code.issued(trips)
    assert half - without == code.issued(trips) - half


def test_a_loop_without_a_number_is_refused(code):
    with pytest.raises(ValueError, match=r"no number of trips for the loop at .*inner"):
        code.issued({"outer": 1})
    with pytest.raises(ValueError, match="expected one loop at 'nowhere'"):
        code.issued({}, one="nowhere")


def test_the_tables_are_those_of_the_results():
    found = json.loads((RESULTS / "cuda_counts.json").read_text())
    text = "".join(page.read_text() for page in pages())
    for name in ("cuda counts of Tucker-2", "cuda counts of diversity"):
        _, key, make = tables.TABLES[name]
        assert f"<!-- benchmark: {name} -->\n\n{make(found[key])}\n" in text
