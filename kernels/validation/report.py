"""What a validation found, as plain data: JSON by the schema `fasim.validation/1`, and JUnit XML for CI."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from xml.etree import ElementTree

from .check import FAIL, NOTE, PASS, SKIP, VERDICTS, Check

SCHEMA = "fasim.validation/1"
SURVEY = "survey"
"""The group of what was found before any other was asked: `survey`."""


@dataclass
class Report:
    """All checks of one subject on one device in one dtype, with what is needed to repeat them."""

    subject: str
    device: str
    dtype: str
    seed: int
    quick: bool
    checks: list[Check] = field(default_factory=list)
    rmse: list[dict] = field(default_factory=list)
    environment: dict = field(default_factory=dict)
    seconds: float = 0.0
    options: tuple[str, ...] = ()

    @property
    def groups(self) -> list[str]:
        """Groups in the order they ran."""
        return list(dict.fromkeys(check.group for check in self.checks))

    def of(self, group: str) -> list[Check]:
        """The checks of one group."""
        return [check for check in self.checks if check.group == group]

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.verdict == FAIL]

    @property
    def notes(self) -> list[Check]:
        """What is worth knowing and decides nothing."""
        return [check for check in self.checks if check.verdict == NOTE]

    @property
    def passed(self) -> bool:
        """No check failed, and at least one passed: all skipped is no pass."""
        return not self.failures and any(check.verdict == PASS for check in self.checks)

    @property
    def idle(self) -> list[str]:
        """Groups in which nothing could be checked."""
        return [g for g in self.groups if g != SURVEY and all(check.verdict == SKIP for check in self.of(g))]

    @property
    def conclusion(self) -> str:
        """One line: the verdict, how many checks, what was not checked."""
        count = Counter(check.verdict for check in self.checks)
        skipped = f", {count[SKIP]} not applicable" if count[SKIP] else ""
        skipped += f", {count[NOTE]} to know" if count[NOTE] else ""
        unchecked = f"; nothing checked in {', '.join(self.idle)}" if self.idle else ""
        where = f"{self.dtype} on {self.device}, seed {self.seed}"
        if self.failures:
            by_group = Counter(check.group for check in self.failures)
            groups = ", ".join(f"{group} {number}" for group, number in by_group.items())
            total = count[FAIL] + count[PASS]
            return f"{self.subject} fails {count[FAIL]} of {total} checks ({groups}){skipped}{unchecked}: {where}"
        if not count[PASS]:
            return f"{self.subject} is not validated: no check applies to it: {where}"
        busy = len({check.group for check in self.checks if check.verdict == PASS})
        return f"{self.subject} passes {count[PASS]} checks in {busy} groups{skipped}{unchecked}: {where}"

    def reproduce(self, check: Check) -> str:
        """The command that repeats one check's group with the same inputs."""
        asked = [] if check.group == SURVEY else [f"--only {check.group}"]
        return " ".join(["fasim validate", self.subject, *self.options, f"--seed {check.seed}", *asked])

    def to_dict(self) -> dict:
        """The report as plain data."""
        return {
            "schema": SCHEMA,
            "subject": self.subject,
            "device": self.device,
            "dtype": self.dtype,
            "seed": self.seed,
            "quick": self.quick,
            "verdict": PASS if self.passed else FAIL,
            "conclusion": self.conclusion,
            "seconds": round(self.seconds, 3),
            "environment": dict(self.environment),
            "groups": [
                {
                    "name": group,
                    **{verdict: sum(c.verdict == verdict for c in self.of(group)) for verdict in VERDICTS},
                }
                for group in self.groups
            ],
            "checks": [_finite(check.to_dict() | self._how(check)) for check in self.checks],
            "rmse": [_finite(row) for row in self.rmse],
        }

    def _how(self, check: Check) -> dict:
        return {"reproduce": self.reproduce(check)} if check.verdict == FAIL else {}


def junit(reports: list[Report]) -> str:
    """JUnit XML: one test suite per subject and group, one test case per check."""
    root = ElementTree.Element("testsuites", name="fasim validate")
    for report in reports:
        for group in report.groups:
            checks = report.of(group)
            suite = ElementTree.SubElement(
                root,
                "testsuite",
                name=f"{report.subject} {report.dtype} {group}",
                tests=str(len(checks)),
                failures=str(sum(c.verdict == FAIL for c in checks)),
                errors="0",
                skipped=str(sum(c.verdict == SKIP for c in checks)),
            )
            for check in checks:
                case = ElementTree.SubElement(suite, "testcase", classname=f"{report.subject}.{group}", name=check.case)
                if check.verdict == FAIL:
                    failure = ElementTree.SubElement(case, "failure", message=check.message)
                    failure.text = f"{check.message}\nreproduce: {report.reproduce(check)}"
                elif check.verdict == SKIP:
                    ElementTree.SubElement(case, "skipped", message=check.message)
                elif check.verdict == NOTE:
                    ElementTree.SubElement(case, "system-out").text = check.message
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _finite(value: object) -> object:
    """Floats to four digits; JSON has no NaN or Inf, so they become strings."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, float) and value - value != 0.0:
        return str(value)
    return float(f"{value:.4g}") if isinstance(value, float) else value
