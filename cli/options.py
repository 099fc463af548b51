"""The options that commands share, and what they stand for in the simulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from cyclopts import Group, Parameter

from ..simulator.errors import UsageError, did_you_mean
from . import output

if TYPE_CHECKING:
    from ..simulator.devices.changes import Changed
    from ..simulator.devices.device import Device
    from ..simulator.problem.tile import Tile
    from ..simulator.problem.workload import Workload
    from ..simulator.results.run import Run
    from ..traces.predictions import Question

_WORKLOAD = Group("Workload", sort_key=1)
_MACHINE = Group("Machine and tile", sort_key=2)


def _require(names: tuple[str, ...]) -> None:
    if not names:
        raise ValueError("--schedule needs a name, such as fa3")


_NAMES = "(see `fasim schedules`), or your own as ./mine.py:my_schedule, a file that is run"
Json = Annotated[bool, Parameter(name="--json", negative=(), show_default=False, help="Print JSON, alone, on stdout.")]
Schedules = Annotated[
    tuple[str, ...],
    Parameter(
        name="--schedule",
        negative=(),
        consume_multiple=True,
        validator=lambda _, names: _require(names),
        show_default=" ".join,
        help=f"Schedules {_NAMES}; several are set beside each other. --schedule may be left out.",
    ),
]
Schedule = Annotated[
    str,
    Parameter(
        name="--schedule",
        help=f"A schedule {_NAMES}. --schedule may be left out.",
    ),
]


@Parameter(name="*", group=_WORKLOAD)
@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """What one head is asked to compute, which is all that a recorded instruction stream depends on."""

    seqlen: int | None = None
    "Length of queries and of keys. [default: 8448]"
    seqlen_q: int | None = None
    "Length of queries alone; needs --seqlen-k."
    seqlen_k: int | None = None
    "Length of keys alone; needs --seqlen-q."
    head_dim: int = 128
    "Width of one head: 64, 128 or 256."
    dtype: str = "fp16"
    "fp16, bf16 or e4m3 (FP8)."
    causal: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    "Mask the keys after each query, aligned bottom right."
    pass_: Annotated[str, Parameter(name="--pass")] = "forward"
    "forward or backward; fasim predict also takes both."

    usual_seqlen: ClassVar[int] = 8448
    """Where no length is given: FlashAttention-3 Table 2, divisible by 132 SMs x 64 rows."""

    def directions(self) -> tuple[str, ...]:
        """The passes asked for; raises UsageError for what is none."""
        from ..simulator.problem.workload import DIRECTIONS

        if self.pass_ not in (*DIRECTIONS, "both"):
            possible = (*DIRECTIONS, "both")
            raise UsageError(f"--pass {self.pass_!r} is not known ({', '.join(possible)}){did_you_mean(self.pass_, possible)}")
        return DIRECTIONS if self.pass_ == "both" else (self.pass_,)

    def forward_only(self, command: str) -> None:
        """Raise UsageError where a command that knows the forward alone is asked for another pass."""
        if self.directions() != ("forward",):
            raise UsageError(f"{command} does the forward alone, not --pass {self.pass_}; fasim predict has the backward")

    def build(self, direction: str | None = None) -> Workload:
        """The workload these options describe, of one pass; raises UsageError where they contradict each other."""
        from ..simulator.problem.workload import Workload

        if direction is None:
            if len(self.directions()) > 1:
                raise UsageError("--pass both is for fasim predict: give forward or backward")
            (direction,) = self.directions()

        split = (self.seqlen_q, self.seqlen_k)
        if self.seqlen is not None and split != (None, None):
            raise UsageError("--seqlen sets both lengths: give it alone, or --seqlen-q and --seqlen-k")
        if (self.seqlen_q is None) != (self.seqlen_k is None):
            raise UsageError("--seqlen-q and --seqlen-k go together: give both, or --seqlen")
        lengths = {"seqlen_q": self.seqlen_q, "seqlen_k": self.seqlen_k}
        if split == (None, None):
            lengths = {"seqlen": self.usual_seqlen if self.seqlen is None else self.seqlen}
        shape = {"head_dim": self.head_dim, "dtype": self.dtype, "causal": self.causal}
        return Workload(**self._heads(), **lengths, **shape, direction=direction)

    def _heads(self) -> dict[str, int | None]:
        return {"batch": 1, "heads": 1}


@Parameter(name="*", group=_WORKLOAD)
@dataclass(frozen=True, kw_only=True)
class _HeadOptions:
    batch: int = 4
    "Sequences in the batch."
    heads: int = 16
    "Query heads."
    kv_heads: int | None = None
    "Key and value heads: fewer than --heads for GQA, 1 for MQA. [default: as --heads]"


@Parameter(name="*", group=_WORKLOAD)
@dataclass(frozen=True, kw_only=True)
class WorkloadOptions(ShapeOptions, _HeadOptions):
    """What attention is asked to compute."""

    def _heads(self) -> dict[str, int | None]:
        return {"batch": self.batch, "heads": self.heads, "kv_heads": self.kv_heads}


@Parameter(name="*", group=_WORKLOAD)
@dataclass(frozen=True, kw_only=True)
class PackedOptions(WorkloadOptions):
    """What attention is asked to compute, of one length or of packed sequences."""

    lengths: str | None = None
    "Packed sequences, in place of --batch and --seqlen: 100,2000,37, or 256:8000 where queries and keys differ, or a file of such."

    def build(self, direction: str | None = None) -> Workload:
        """As of ShapeOptions; raises UsageError also where --lengths contradicts the others."""
        if self.lengths is None:
            return super().build(direction)
        from ..simulator.problem.workload import Workload
        from .lengths import lengths

        if self.batch != WorkloadOptions.batch or (self.seqlen, self.seqlen_q, self.seqlen_k) != (None, None, None):
            raise UsageError("--lengths says how many sequences there are and how long each is: leave --batch and --seqlen out")
        found = lengths(self.lengths)
        heads = {"heads": self.heads, "kv_heads": self.kv_heads, "batch": len(found)}
        shape = {"head_dim": self.head_dim, "dtype": self.dtype, "causal": self.causal, "lengths": found}
        return Workload(**heads, **shape, direction=direction or self.directions()[-1])


@Parameter(name="*", group=_WORKLOAD)
@dataclass(frozen=True, kw_only=True)
class WalkedOptions(WorkloadOptions):
    """What is walked: one head of few tokens unless more is asked for."""

    usual_seqlen: ClassVar[int] = 1024
    seqlen: int | None = None
    "Length of queries and of keys. [default: 1024]"
    batch: int = 1
    "Sequences in the batch."
    heads: int = 1
    "Query heads, walked one after another."


_SET = (
    "What if: a field of the device as field=value or field=x2, or a resource as hbm=x2 (mufu, tensor, issue, smem, l2, hbm, "
    "power, launch, sms, clock), and what depends on it follows. May be given several times."
)


@Parameter(name="*", group=_MACHINE)
@dataclass(frozen=True, kw_only=True)
class TileOptions:
    """The device, and the tile where the default one is not wanted."""

    device: str = "h100-sxm"
    "Name of a device (see `fasim devices`) or path of your own TOML file."
    tile: str | None = None
    "Rows of Q by rows of K of one tile, as 128x128. [default: from the schedule's table]"
    stages: int | None = None
    "Slots of the K and V rings in shared memory."
    cluster: int | None = None
    "CTAs of a cluster that share K and V by TMA multicast."
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative=(), show_default=False, help=_SET)] = ()
    splits: int | None = None
    "Parts of the keys, of --schedule decode. [default: as many as its kernel would take]"
    resident: int | None = None
    "CTAs that share an SM, of Hopper schedules. [default: 1]"
    pack_gqa: bool | None = None
    "Whether the query heads of a K/V head are rows of one tile, of --schedule decode; no: a tile for each. [default: yes]"

    def load(self) -> Device:
        """The device, with what --set changes; raises UsageError for an unknown name or field, or a broken file."""
        return self.changed().device

    def changed(self) -> Changed:
        """The device with what --set changes, and what followed."""
        from ..simulator.devices.changes import change
        from ..simulator.devices.device import load_device

        return change(load_device(self.device), self.set_)

    def choose_tile(self, workload: Workload, schedule: str, device: Device) -> Tile | None:
        """The tile asked for; None leaves the choice to the schedule's own table."""
        from ..simulator.schedules import find_schedule

        changes = {name: getattr(self, name) for name in ("stages", "cluster", "resident") if getattr(self, name) is not None}
        changes |= {} if self.splits is None else {"parts": self.splits}
        if self.pack_gqa and not find_schedule(schedule, workload.direction).packs:
            raise UsageError(f"'{schedule}' has a tile for each query head: give --schedule decode for --pack-gqa")
        if self.tile is None and not changes and self.pack_gqa is not False:
            return None
        from dataclasses import replace

        from ..simulator.predict import default_tile
        from ..simulator.problem.tile import Tile

        tile = default_tile(workload, schedule, device, packed=self.pack_gqa is not False)
        if self.tile is not None:
            asked = Tile.parse(self.tile)
            consumers = tile.consumers_for(asked.block_m, asked.block_n if workload.backward else None)
            changes |= {"block_m": asked.block_m, "block_n": asked.block_n, "consumers": consumers}
        return replace(tile, **changes)


@Parameter(name="*", group=_MACHINE)
@dataclass(frozen=True, kw_only=True)
class MachineOptions(TileOptions):
    """The device with its clock, and the tile."""

    clock: float | None = None
    "Pin the SM clock, in MHz. [default: the clock that the power model predicts]"
    regime: str | None = None
    "The clock after seconds of load (sustained), or in the first 30 ms after a rest (burst). [default: sustained]"

    @property
    def clock_hz(self) -> float | None:
        """The pinned clock in Hz, or None where the power model decides."""
        if self.clock is not None and not 0 < self.clock < float("inf"):
            raise UsageError(f"--clock {self.clock:g} is not a clock: give MHz above zero, such as 1830")
        if self.clock is not None and self.regime is not None:
            raise UsageError("--clock pins the clock and --regime says how it is found: give one of them")
        return None if self.clock is None else self.clock * 1e6

    def question(self, workload: Workload, schedule: str, why: bool = False) -> Question:
        """What is asked about one schedule; with `why`, what each resource twice as fast would save too."""
        from ..simulator.schedules import find_schedule
        from ..traces.predictions import Question

        device = self.load()
        tile = self.choose_tile(workload, find_schedule(schedule, workload.direction).name, device)
        return Question(workload, schedule, device, tile, self.clock_hz, self.regime or "sustained", why)

    def predict(self, workload: Workload, schedule: str, kernel: str | None = None) -> Run:
        """Predict one schedule with these options and keep the spans of `kernel`, by default of the one with the softmax."""
        question = self.question(workload, schedule)
        with output.progress("predicting") as advance:
            advance(0, 1, schedule)
            from ..simulator.compiling import COMPILES, heard
            from ..simulator.predict import predict

            with heard(lambda: advance(0, 1, COMPILES)):
                return predict(**question.asked(), kernel=kernel)
