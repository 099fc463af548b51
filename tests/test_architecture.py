"""DESIGN.md's one-way imports and silence, read off the source with ast."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fasim

ROOT = Path(fasim.__file__).parent
ROOMS = ("simulator", "kernels", "traces", "cli")
FORBIDDEN = {
    "simulator": {"torch", "triton", "cuda", "rich", "cyclopts", "fasim.kernels", "fasim.traces", "fasim.cli"},
    "traces": {"torch", "triton", "cuda", "rich", "cyclopts", "fasim.cli"},
    "kernels": {"rich", "cyclopts", "fasim.cli"},
    "cli": {"numba", "torch", "triton", "cuda"},
}


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Absolute names of every module a file imports, wherever in the file, relative imports resolved."""
    package = ["fasim", *path.relative_to(ROOT).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room):
    broken = {
        (str(path.relative_to(ROOT)), name)
        for path in sources(room)
        for name in imports(path)
        for wall in FORBIDDEN[room]
        if name == wall or name.startswith(wall + ".")
    }
    assert not broken


FLOORS = ("values", "problem", "devices", "code", "language", "schedules", "results", "replay", "layout", "predict")
"""Of the simulator, from the ground up: order, code and machine, each in a room that imports those before it alone."""
ON_FLOOR = dict.fromkeys(("errors", "reading", "units", "jit", "compiling"), "values") | {"limits": "replay", "clock": "devices"}


def test_the_simulators_rooms_stand_on_those_below():
    for path in sources("simulator"):
        room = path.relative_to(ROOT / "simulator").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        floor = FLOORS.index(ON_FLOOR.get(room, room))
        for name in imports(path):
            below = name.split(".")[2:3] if name.startswith("fasim.simulator.") else []
            assert all(FLOORS.index(ON_FLOOR.get(each, each)) <= floor for each in below), f"{path.name} imports {name}"


def modules() -> dict[str, Path]:
    """Every file of the package by its module's name."""
    return {
        ".".join(["fasim", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
        for room in ROOMS
        for path in sources(room)
    }


def test_no_file_imports_itself_by_way_of_others():
    known = modules()
    edges = {name: (imports(path) & known.keys()) - {name} for name, path in known.items()}
    for name in edges:  # a package is named by each import of what lies in it
        edges[name] -= {each for each in edges if name.startswith(each + ".")}
    circles = {frozenset({one, other}) for one in edges for other in edges[one] if one in reached(edges, other)}
    assert not circles


def reached(edges: dict[str, set[str]], start: str) -> set[str]:
    """All that `start` imports, by way of whatever."""
    seen, left = set(), [start]
    while left:
        new = edges[left.pop()] - seen
        seen |= new
        left += new
    return seen


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "cli"])
def test_nothing_but_the_cli_prints(room):
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources(room)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert calls == []


@pytest.mark.parametrize("room", ["simulator", "traces", "cli"])
def test_imports_within_the_package_are_relative(room):
    absolute = {
        (str(path.relative_to(ROOT)), node.module)
        for path in sources(room)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "fasim"
    }
    assert not absolute


def test_schedules_know_verbs_not_cycles():
    """Invariant 3, one half: a schedule imports neither device, engine nor clock, and names no cycles."""
    for path in sources("simulator/schedules"):
        names = {name.split(".")[2] for name in imports(path) if name.startswith("fasim.simulator.")}
        assert not names & {"devices", "replay", "clock", "results"}, path.name
        words = {n.id for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Name)}
        assert not {word for word in words if "cycle" in word}, path.name


def test_the_walls_stand_on_something():
    assert all(sources(room) for room in ROOMS)
    assert "numba" in imports(ROOT / "simulator" / "jit.py")


def test_units_know_cycles_not_attention():
    """No name in the engine or its tables speaks of attention: the same units would replay any other kernel."""
    words = {"attention", "softmax", "causal", "heads", "query", "keys", "seqlen", "lse", "mask"}
    for room in ("engine", "machine"):
        tree = ast.parse((ROOT / "simulator" / "replay" / f"{room}.py").read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        spoken = {part for name in names for part in name.lower().split("_")}
        assert not spoken & words


def test_every_metric_derives_from_a_run_alone():
    tree = ast.parse((ROOT / "simulator" / "results" / "metrics.py").read_text())
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    assert public
    for function in public:
        assert [(a.arg, ast.unparse(a.annotation)) for a in function.args.args] == [("run", "Execution")], function.name
