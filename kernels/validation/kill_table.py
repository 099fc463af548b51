"""The kill table: which group of the suite rejects which planted fault."""

from __future__ import annotations

from dataclasses import dataclass, field

from .check import FAIL, PASS, Check
from .mutants import Mutant
from .report import Report


@dataclass
class KillTable:
    """Which group rejects which planted fault, and how."""

    groups: list[str]
    correct: Report
    reports: dict[str, Report] = field(default_factory=dict)
    mutants: dict[str, Mutant] = field(default_factory=dict)
    seconds: float = 0.0

    def kills(self, mutant: str) -> dict[str, list[Check]]:
        """Group -> the checks of it that failed, up to the one that said enough."""
        return {group: [c for c in self.reports[mutant].of(group) if c.verdict == FAIL] for group in self.groups}

    @property
    def alive(self) -> list[str]:
        """Mutants that no group rejects."""
        return [name for name in self.reports if not any(self.kills(name).values())]

    @property
    def passed(self) -> bool:
        """Every mutant is rejected, and the correct kernel is not."""
        return not self.alive and self.correct.passed

    def only_by(self, group: str) -> list[str]:
        """Mutants that would live without this group."""
        return [n for n in self.reports if [g for g, checks in self.kills(n).items() if checks] == [group]]

    @property
    def conclusion(self) -> str:
        """One line."""
        if not self.correct.passed:
            return f"self-test failed: the correct kernel is rejected: {self.correct.conclusion}"
        if self.alive:
            return f"self-test failed: {len(self.alive)} of {len(self.reports)} planted faults live: {', '.join(self.alive)}"
        return (
            f"self-test passed: all {len(self.reports)} planted faults rejected, the correct kernel accepted: "
            f"{self.correct.dtype} on {self.correct.device}, {self.seconds:.0f} s"
        )

    def to_dict(self) -> dict:
        """Plain data; `message` is the first rejection, by the group that must reject it where it does."""
        rows = []
        for name in self.reports:
            mutant, kills = self.mutants[name], self.kills(name)
            first = next((c for c in kills.get(mutant.group, [])), next((c for each in kills.values() for c in each), None))
            rows.append(
                {"mutant": name, "fault": mutant.fault, "killed": first is not None}
                | {"rejected_by": [group for group, checks in kills.items() if checks]}
                | {"message": first.message if first else ""}
            )
        return {
            "schema": "fasim.validation.self-test/2",
            "verdict": PASS if self.passed else FAIL,
            "conclusion": self.conclusion,
            "device": self.correct.device,
            "dtype": self.correct.dtype,
            "seed": self.correct.seed,
            "seconds": round(self.seconds, 1),
            "groups": self.groups,
            "needed_for": {group: self.only_by(group) for group in self.groups},
            "mutants": rows,
        }
