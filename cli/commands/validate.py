"""`fasim validate`: a kernel held to fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .. import output
from ..options import Json


def validate(
    kernel: str | None = None,
    *,
    quick: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    only: Annotated[tuple[str, ...], Parameter(name="--only", negative=(), show_default=False)] = (),
    seed: int = 0,
    device: str | None = None,
    dtype: str = "fp16",
    kind: str = "dense",
    head_dim: Annotated[tuple[str, ...], Parameter(name="--head-dim", negative=(), show_default=False)] = (),
    forward_only: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    arguments: Annotated[tuple[str, ...], Parameter(name="--with", negative=(), show_default=False)] = (),
    sanitize: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    self_test: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    junit: Path | None = None,
    json: Json = False,
) -> int:
    """Hold an attention kernel to fp64: accuracy, inputs, shapes, memory, determinism, gradients.

    Checks ours, PyTorch's (torch-cudnn, torch-fa2, torch-math) or your own function, given as package.module:function
    and called as f(q, k, v, causal=..., softmax_scale=...) -> O or (O, LSE), on (B, S, H, D) tensors; with --dtype e4m3
    also q_descale, k_descale and v_descale of (B, kv heads). With --kind varlen tensors are packed, (total, H, D), and
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k are given too; with --kind decode queries are few and
    num_splits is given; where it takes cache_seqlens and page_table, also a cache of (pages, page size, kv heads, D). Raise
    NotImplementedError for what it does not support. Exit status: 0 pass, 1 a check failed, 3 no GPU where one is needed.

    Example: fasim validate my_kernels.attention:forward --quick

    Theory: an error is large or small only beside what PyTorch makes in the same precision (FlashAttention's rule: at
    most twice that, plus rounding), and a suite is worth what it rejects: --self-test plants faults and counts.

    Parameters
    ----------
    kernel
        standard, fa1, fa2, torch-cudnn, torch-fa2, torch-math, or package.module:function; in e4m3 fa3, fa3-blocks,
        fa3-keyed, fa3-keyed-heads, fa3-two-level, fa3-approximate, overlap-2stage or your own. [default: all of ours]
    quick
        One head dim and the shorter lengths.
    only
        Run this group of checks alone; repeat it for several.
    seed
        Seed of all inputs; a failed check prints the one that repeats it.
    device
        cuda, or cpu for callables that run there. [default: cuda; cpu with --self-test]
    dtype
        fp16, bf16, fp32, fp64 or e4m3.
    kind
        dense, varlen for packed sequences or decode for few queries in parts; with ours fa2 and fa3, or decode.
    head_dim
        A head dim to check, such as 96, or 192x128 where V's differs from Q's and K's; repeat it. [default: the kernel's
        own; 64 and 128 for package.module:function]
    forward_only
        Ask for no gradients; found out by itself where there is no backward.
    arguments
        NAME=VALUE, another argument for package.module:function, such as deterministic=True; repeat it.
    sanitize
        Also run compute-sanitizer's memcheck and racecheck.
    self_test
        Hold the suite itself to its planted faults and show which group rejects which.
    junit
        Also write the checks as JUnit XML.
    """
    from ...kernels.validation.check import MissingTool
    from ...kernels.validation.precision import subjects_of

    subjects = subjects_of(dtype, kind)
    if kernel:
        subjects.look_up(kernel)  # a wrong name is said first, torch or not
    try:
        from ...kernels.validation import suite
        from ...kernels.validation.isolation import validate_apart
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "torch":
            raise
        output.note("fasim: validate needs torch, which is not installed: pip install 'fasim[kernels]'")
        return 3
    from .. import validate as render

    try:
        with output.progress("validating") as advance, output.stdout_is_ours():
            if self_test:
                table = suite.self_test(device=device or "cpu", dtype=dtype, kind=kind, seed=seed, only=only, advance=advance)
                reports = []
            else:
                where = device or "cuda"
                chosen = [kernel] if kernel else subjects.OURS
                options = {"device": where, "dtype": dtype, "kind": kind, "seed": seed, "quick": quick, "only": only}
                options |= {"head_dims": head_dim, "forward_only": forward_only}
                reports = [
                    validate_apart(each, arguments=arguments, **options, with_sanitizer=sanitize, advance=advance)
                    for each in chosen
                ]
    except MissingTool as error:
        output.note(f"fasim: {error}")
        return 3
    if self_test:
        output.emit_json(table.to_dict()) if json else output.stdout().print(render.kill_table(table))
        return 0 if table.passed else 1
    if junit:
        from ...kernels.validation.report import junit as as_xml

        output.write_file(junit, as_xml(reports))
        output.note(f"wrote {junit}")
    if json:
        output.emit_json([each.to_dict() for each in reports])
    else:
        titles = {name: title for name, (title, _) in suite.groups_of(dtype, kind).items()}
        for each in reports:
            output.stdout().print(render.report(each, titles))
    return 0 if all(each.passed for each in reports) else 1
