"""The vocabulary of the suite: a Case is a problem, a Trial a question about it, a Check the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

PASS, FAIL, SKIP, NOTE = "pass", "fail", "skip", "note"
VERDICTS = (PASS, FAIL, SKIP, NOTE)


class Fault(AssertionError):
    """The kernel is wrong; the message is the sentence a user reads."""


class Skipped(Exception):
    """The question does not apply here; the message says why."""


class Noted(Exception):
    """Worth knowing and no fault: the message says what the kernel does. `figures` as of a check that passes."""

    def __init__(self, message: str, figures: dict | None = None) -> None:
        super().__init__(message)
        self.figures = figures or {}


class MissingTool(RuntimeError):
    """What was asked needs a GPU, a library or a program that is not here; the message is one sentence."""


class HeadDim(int):
    """A head dim of Q and K, such as 128; where V's differs, `v` is that and it reads "192x128"."""

    def __new__(cls, qk: int, v: int | None = None) -> HeadDim:
        """`v` is that of V, `qk` unless given."""
        made = super().__new__(cls, qk)
        made.v = qk if v is None else v
        return made

    def __eq__(self, other: object) -> bool:
        return int(self) == other and self.v == getattr(other, "v", other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((int(self), self.v)) if self.v != int(self) else hash(int(self))

    def __str__(self) -> str:
        return f"{int(self)}" if self.v == int(self) else f"{int(self)}x{self.v}"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention problem: shapes in the convention q (B, Sq, H, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv), and kind of
    inputs. Dv is D unless `head_dim` is a HeadDim that says otherwise.

    `name` says what the case is about and, with the group and the seed, fixes its random numbers.
    `layout` is how q, k and v lie in memory: "contiguous" or a name from `layouts.LAYOUTS`.
    """

    name: str
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    batch: int = 1
    heads: int = 2
    kv_heads: int | None = None
    causal: bool = False
    softmax_scale: float | None = None
    inputs: str = "random"
    layout: str = "contiguous"

    @property
    def keywords(self) -> dict:
        """What the subject is given besides causal and softmax_scale."""
        return {}

    @property
    def heads_kv(self) -> int:
        """Key and value heads; as many as query heads unless the case says otherwise."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_dim_v(self) -> int:
        """Head dim of V and O."""
        return getattr(self.head_dim, "v", self.head_dim)

    @property
    def q_shape(self) -> tuple[int, int, int, int]:
        """(B, Sq, H, D)."""
        return self.batch, self.seqlen_q, self.heads, int(self.head_dim)

    @property
    def k_shape(self) -> tuple[int, int, int, int]:
        """(B, Sk, Hkv, D)."""
        return self.batch, self.seqlen_k, self.heads_kv, int(self.head_dim)

    @property
    def v_shape(self) -> tuple[int, int, int, int]:
        """(B, Sk, Hkv, Dv)."""
        return self.batch, self.seqlen_k, self.heads_kv, self.head_dim_v

    @property
    def o_shape(self) -> tuple[int, int, int, int]:
        """(B, Sq, H, Dv)."""
        return self.batch, self.seqlen_q, self.heads, self.head_dim_v

    def __str__(self) -> str:
        keys = [f"k, v {self.k_shape}"] if self.k_shape == self.v_shape else [f"k {self.k_shape}", f"v {self.v_shape}"]
        parts = [self.inputs, f"q {self.q_shape}", *keys, "causal" if self.causal else "full"]
        parts += [self.layout] if self.layout != "contiguous" else []
        parts += [f"softmax_scale {self.softmax_scale:g}"] if self.softmax_scale is not None else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Trial:
    """A question: `run` returns figures where the kernel passes, and raises Fault, Skipped or Noted where it does not."""

    name: str
    run: Callable[[], dict]


@dataclass(frozen=True)
class Check:
    """The answer to one trial.

    `verdict` is "pass", "fail", "skip" (the question does not apply) or "note" (information: neither good nor bad, and
    it decides nothing). `figures` holds what was measured, such as max_error and max_error_allowed; `message` says what
    is wrong, what is worth knowing, or why nothing could be said. With the same `seed` the group repeats the same inputs.
    """

    group: str
    case: str
    verdict: str
    seed: int
    message: str = ""
    figures: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Plain data, as in the report."""
        return {
            "group": self.group,
            "case": self.case,
            "verdict": self.verdict,
            "seed": self.seed,
            "message": self.message,
            "figures": dict(self.figures),
        }


class explained:
    """Adds to a Fault the inputs it came from and the promise that it breaks."""

    def __init__(self, case: Case, promise: str = "") -> None:
        self.case, self.promise = case, promise

    def __enter__(self) -> None:
        """Nothing to set up."""

    def __exit__(self, kind: type | None, fault: BaseException | None, _: object) -> None:
        if isinstance(fault, Fault):
            promise = f"{self.promise}: " if self.promise else ""
            raise Fault(f"{promise}{fault}; inputs: {self.case}") from None
