"""The hand-overs that racecheck is asked about: what they are made of, and how its answer is read."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from fasim.kernels.validation import hand_overs

pytest.importorskip("cuda.core")

RECORDED = Path(hand_overs.__file__).parents[2] / "traces" / "recorded" / "validation"
SAID = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at written_then_barrier_1+0x150 in default_program:87
=========     and Read access at written_then_barrier_1+0x110 in default_program:87 [4 hazards]
=========
========= Warning: Race reported between Write access at nothing+0x150 [4 hazards]
right: {}
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""


def test_each_hand_over_is_a_kernel_with_the_instructions_it_is_named_for():
    from fasim.kernels.calibrate.harness import compile_cubin
    from fasim.kernels.compile import disassemble

    codes = {code.name: code for code in disassemble.of_cubin(compile_cubin(hand_overs.SOURCE.read_text()))}
    assert sorted(codes) == sorted(hand_overs.names()) and hand_overs.CONTROL in codes

    def said(name: str, opcode: str) -> list[str]:
        return [f"{each.predicate}{each.operands}" for each in codes[name].instructions if each.opcode.startswith(opcode)]

    assert any("0x8, 0xa0" in each for each in said("written_then_named_arrival", "BAR.ARV"))
    assert not said(hand_overs.CONTROL, "SYNCS.ARRIVE")
    assert not said("written_by_lanes_that_all_arrive", "SYNCS.ARRIVE")[0].startswith("!P")
    assert said("written_by_the_one_that_arrives", "SYNCS.ARRIVE")[0].startswith("!P")
    lanes = "written_by_lanes_then_one_arrives"
    assert said(lanes, "WARPSYNC") and not said(f"{lanes}_in_step", "WARPSYNC")


def test_a_report_is_read_by_kernel():
    said = hand_overs.read(SAID)
    assert [name for name, lines in said.items() if lines] == ["written_then_barrier_1", hand_overs.CONTROL]
    assert "4 hazards" in said["written_then_barrier_1"][0]


def test_what_racecheck_follows_is_as_docs_triton_says():
    """One thread's arrival at an mbarrier for others is an order that it does not follow, a named barrier one that it does."""
    record = json.loads((RECORDED / "hand_overs.json").read_text(encoding="utf-8"))
    assert record["source_sha256"] == hashlib.sha256(hand_overs.SOURCE.read_bytes()).hexdigest()
    reported = {row["hand_over"]: bool(row["reported"]) for row in record["rows"]}
    assert [*reported] == hand_overs.names() and all(row["right"] for row in record["rows"])
    for_others = [name for name in reported if re.search(r"then_one(_of_each_warp)?_arrives", name)]
    assert {name for name, said in reported.items() if said} == {*for_others, hand_overs.CONTROL}
