"""`python -m fasim.kernels.validation --out DIR`: the suite where only torch is installed; writes one JSON per subject.

`--exercise NAME` runs a few small calls and checks nothing: what compute-sanitizer is put around.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ...simulator.errors import UsageError
from .check import MissingTool


def main() -> int:
    """Exit status: 0 pass, 1 a check failed, 2 usage, 3 no GPU or tool."""
    parser = argparse.ArgumentParser(prog="python -m fasim.kernels.validation", description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", action="append", default=[], help="a subject's name or package.module:function; repeat it")
    parser.add_argument("--dtype", action="append", default=[], help="fp16, bf16, fp32, fp64 or e4m3; repeat it [default: fp16]")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--head-dim", action="append", default=[], help="a head dim, such as 96 or 192x128; repeat it")
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--with", action="append", default=[], dest="arguments", help="NAME=VALUE for package.module:function")
    parser.add_argument("--kind", default="dense", help="dense, varlen or decode")
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--self-test", action="store_true", help="hold the suite to its planted faults")
    parser.add_argument("--processes", type=int, help="of the self-test [default: 4 on a GPU, 1 on the CPU]")
    parser.add_argument("--out", type=Path, help="folder for the JSON reports")
    parser.add_argument("--name", help="file name of the report in --out, where there is one")
    parser.add_argument("--exercise", metavar="NAME", help="call this subject a few times, without checks")
    options = parser.parse_args()
    try:
        if options.exercise:
            from .exercise import exercise

            exercise(options.exercise, (options.dtype or ["fp16"])[0], options.seed, options.kind, options.device)
            return 0
        return _self_test(options) if options.self_test else _validate(options)
    except UsageError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except MissingTool as error:
        sys.stderr.write(f"{error}\n")
        return 3


def _validate(options: argparse.Namespace) -> int:
    from .isolation import validate_apart
    from .precision import subjects_of

    status = 0
    for dtype in options.dtype or ["fp16"]:
        for name in options.kernel or subjects_of(dtype, options.kind).OURS:
            report = validate_apart(
                name,
                arguments=tuple(options.arguments),
                device=options.device,
                dtype=dtype,
                kind=options.kind,
                seed=options.seed,
                quick=options.quick,
                only=options.only,
                head_dims=options.head_dim,
                forward_only=options.forward_only,
                with_sanitizer=options.sanitize,
            )
            sys.stdout.write(f"{report.conclusion} ({report.seconds:.1f} s)\n")
            for check in report.failures:
                sys.stdout.write(f"  {check.group}, {check.case}: {check.message}\n")
            sys.stdout.flush()
            status = status if report.passed else 1
            if options.out:
                kind = "" if options.kind == "dense" else f"{options.kind}-"
                file = options.name or f"{kind}{_file_name(name)}-{dtype}"
                _write(options.out / f"{file}.json", report.to_dict())
    return status


def _self_test(options: argparse.Namespace) -> int:
    from .suite import self_test

    dtype = (options.dtype or ["fp16"])[0]
    given = {"device": options.device, "dtype": dtype, "kind": options.kind, "seed": options.seed}
    table = self_test(**given, only=options.only, processes=options.processes)
    sys.stdout.write(f"{table.conclusion}\n")
    if options.out:
        _write(options.out / "self-test.json", table.to_dict())
    return 0 if table.passed else 1


def _write(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


if __name__ == "__main__":
    sys.exit(main())
