"""A Hopper GPU as far as the order of a kernel's events goes, for gluon_language.py.

Copies by TMA land when the scheduler likes, a GEMM reads shared memory from its issue to its wait, partitions run at speeds drawn
at random. An Error says what a GPU would not: that a tile is overwritten while it is read, read before it is full, stored without
a fence; that an mbarrier or a named barrier is arrived at too often; that nobody can go on. What threads write and read
in shared memory is held to what barriers order (`Clock`), whichever came first in this run. Threads of one partition run as one:
barriers between them are the compiler's to place, and are not looked at.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

WARP = 32


class Error(Exception):
    """What a GPU would do wrong, or never finish."""


class _Over(BaseException):
    """Ends a thread whose run is over."""


class DType(SimpleNamespace):
    """A type of elements: its name and bits."""

    def __hash__(self) -> int:
        return hash(self.name)

    def rounded(self, values: np.ndarray) -> np.ndarray:
        """fp32 to this type and back, or whole numbers."""
        if self.name == "bf16":
            bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
            return ((bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000).astype(np.uint32).view(np.float32)
        if self.name == "fp16":
            return values.astype(np.float16).astype(np.float32)
        return values.astype({"fp32": np.float32, "i16": np.uint16, "i32": np.int32, "i64": np.int64}[self.name])

    def of_bits(self, bits: np.ndarray) -> np.ndarray:
        """16 bits as the values they stand for."""
        if self.name == "bf16":
            return (bits.astype(np.uint32) << 16).view(np.float32)
        return bits.astype(np.uint16).view(np.float16).astype(np.float32)

    def bits_of(self, values: np.ndarray) -> np.ndarray:
        """The inverse, of values as `rounded` gives them."""
        if self.name == "bf16":
            return self.rounded(values).view(np.uint32) >> 16
        return values.astype(np.float16).view(np.uint16).astype(np.uint32)


TYPES = {name: DType(name=name, primitive_bitwidth=int(name[-2:])) for name in ("fp16", "bf16", "fp32", "i16", "i32", "i64")}
TYPES["bf16"].primitive_bitwidth = 16


class Whole(int):
    """A whole number of a kernel, whose division truncates where Python's floors: it may not be asked for where they differ."""

    def to(self, dtype: DType) -> Whole:
        return self


def _whole(name: str) -> Callable:
    plain = getattr(int, name)

    def done(self, other):
        if not isinstance(other, int):
            return NotImplemented
        if name in ("__floordiv__", "__mod__") and (self < 0 or other <= 0):
            raise Error(f"{int(self)} is divided by {int(other)}")
        return Whole(plain(self, other))

    return done


for _name in ("add", "sub", "mul", "and", "xor", "or", "rshift", "lshift", "floordiv", "mod"):
    setattr(Whole, f"__{_name}__", _whole(f"__{_name}__"))
for _name in ("add", "mul"):
    setattr(Whole, f"__r{_name}__", _whole(f"__r{_name}__"))
Whole.__rsub__ = lambda self, other: Whole(int(other) - int(self))


class Tensor:
    """Values in registers; layouts are nobody's concern here."""

    type = SimpleNamespace(layout=None)

    def __init__(self, values: np.ndarray, dtype: DType) -> None:
        self.values, self.dtype = values, dtype

    @property
    def shape(self) -> list[int]:
        return list(self.values.shape)

    def to(self, dtype: DType, bitcast: bool = False) -> Tensor:
        return Tensor(dtype.of_bits(self.values) if bitcast else dtype.rounded(self.values), dtype)


def values_of(x: object) -> object:
    return x.values if isinstance(x, Tensor) else x


def made(values: np.ndarray) -> object:
    kind = {"f": "fp32", "i": "i64" if values.dtype == np.int64 else "i32", "b": "i32"}[values.dtype.kind]
    return Tensor(values, TYPES[kind]) if values.ndim else Whole(values) if kind != "fp32" else float(values)


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "lt", "eq"):
    setattr(
        Tensor,
        f"__{_name}__",
        lambda self, other, name=f"__{_name}__": made(getattr(self.values, name)(np.asarray(values_of(other)))),
    )
Tensor.__hash__ = None


class Clock(dict):
    """How far each partition had come, by its title, of all that is known to have happened before (a vector clock)."""

    def learn(self, other: Clock) -> None:
        for title, time in other.items():
            self[title] = max(self.get(title, 0), time)


class Slot:
    """A tile of shared memory: who writes it, who reads it, and whether TMA may see what threads have written."""

    def __init__(self, shape: list[int], dtype: DType) -> None:
        self.values = np.full(shape, np.nan if dtype.primitive_bitwidth == 16 else 0, np.float32)
        self.dtype, self.filling, self.readers, self.unfenced = dtype, False, [], None
        self.accesses: list[tuple[str, bool, int]] = []  # of threads since the last write: who, whether it was the write, when

    def written(self, what: str) -> None:
        if self.filling or self.readers:
            raise Error(
                f"{what} overwrites a tile " + ("that TMA is filling" if self.filling else f"that {self.readers[0]} still reads")
            )


    def accessed(self, writes: bool) -> None:
        """By threads of the partition that runs; Error unless all that it could meet is known to be over."""
        who = MACHINE.current
        for title, wrote, time in self.accesses:
            if (writes or wrote) and who.clock.get(title, 0) < time:
                raise Error(f"{who.title} {'writes' if writes else 'reads'} what {title} may still {'write' if wrote else 'read'}")
        mine = who.title, writes, who.clock[who.title]
        self.accesses = [mine] if writes else [*self.accesses, mine]


class View:
    """A tile as a kernel sees it, reshaped and turned."""

    def __init__(self, slots: list[Slot], shape: list[int], turned: bool = False) -> None:
        self.slots, self.shape, self.turned = slots, list(shape), turned
        self.dtype = slots[0].dtype

    def index(self, number: int) -> View:
        if not 0 <= number < len(self.slots):
            raise Error(f"tile {number} of {len(self.slots)}")
        return View([self.slots[number]], self.shape[1:])

    @property
    def slot(self) -> Slot:
        assert len(self.slots) == 1, "a tile is one of several"
        return self.slots[0]

    def reshape(self, shape: list[int]) -> View:
        return View([self.slot], shape)

    def permute(self, order: tuple[int, ...]) -> View:
        assert order == (1, 0)
        return View([self.slot], self.shape[::-1], not self.turned)

    def read(self) -> np.ndarray:
        if self.slot.filling:
            raise Error("a tile is read before it is full")
        values = self.slot.values.reshape(self.shape[::-1] if self.turned else self.shape)
        return values.T if self.turned else values

    def load(self, layout: object) -> Tensor:
        self.slot.accessed(writes=False)
        return Tensor(self.read().astype(np.int32), TYPES["i32"])

    def store(self, tensor: Tensor) -> None:
        self.slot.written("a store")
        self.slot.accessed(writes=True)
        self.slot.values[:] = tensor.values.reshape(self.slot.values.shape)
        self.slot.unfenced = MACHINE.current


class Barrier:
    """An mbarrier."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0
        self.clock, self.gathered = Clock(), Clock()  # of the phases that are over, and of the one that is not

    def arrived(self, times: int, expected: int = 0) -> None:
        self.pending -= times
        self.bytes += expected
        MACHINE.current.tell(self.gathered)
        if self.pending < 0:
            raise Error("an mbarrier is arrived at more often in one phase than it has arrivals")
        self.settle()

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count
            self.clock.learn(self.gathered)


class Barriers:
    def __init__(self, number: int) -> None:
        self.all = [Barrier() for _ in range(number)]

    def index(self, number: int) -> Barrier:
        return self.all[number]


class Named:
    """A hardware barrier."""

    def __init__(self) -> None:
        self.arrivals, self.generation = {}, 0
        self.clock, self.gathered = Clock(), Clock()

    def arrived(self, who: Partition, threads: int, number: int) -> int:
        """The generation that `who` is of."""
        mine = self.generation
        if who.title in self.arrivals:
            raise Error(f"{who.title} arrives twice at named barrier {number}")
        self.arrivals[who.title] = who.threads
        who.tell(self.gathered)
        if sum(self.arrivals.values()) > threads:
            raise Error(f"named barrier {number} is of {threads} threads and {dict(self.arrivals)} arrive")
        if sum(self.arrivals.values()) == threads:
            self.arrivals, self.generation = {}, mine + 1
            self.clock.learn(self.gathered)
        return mine


class Product:
    """A GEMM in flight; `values` when it has been waited for."""

    def __init__(self, a: object, b: View, acc: Tensor, use_acc: bool) -> None:
        self.a, self.b, self.acc, self.use_acc, self.result = a, b, acc, use_acc, None
        self.title = "a GEMM of " + MACHINE.current.title
        for each in self.tiles:
            each.read()
            each.slot.readers.append(self.title)

    @property
    def tiles(self) -> list[View]:
        return [each for each in (self.a, self.b) if isinstance(each, View)]

    def finish(self) -> None:
        left = self.a.read() if isinstance(self.a, View) else self.a.values
        product = left.astype(np.float32) @ self.b.read().astype(np.float32)
        self.result = Tensor(product + self.acc.values if self.use_acc else product, TYPES["fp32"])
        for each in self.tiles:
            each.slot.readers.remove(self.title)


class Partition:
    """A thread of the kernel: some warps that run the same code."""

    def __init__(self, program: Program, title: str, work: Callable[[], None], warps: int) -> None:
        self.program, self.title, self.threads = program, title, WARP * warps
        self.products: list[Product] = []
        self.stores = 0
        self.clock = Clock(MACHINE.current.clock if MACHINE.current else ())
        self.clock[title] = 1
        self.ready, self.awaits, self.done = (lambda: True), "the start", False
        self.go = threading.Semaphore(0)
        self.thread = threading.Thread(target=self.run, args=(work,), daemon=True)
        self.thread.start()

    def run(self, work: Callable[[], None]) -> None:
        self.go.acquire()
        try:
            if not MACHINE.over:
                work()
                if self.products or self.stores:
                    raise Error(f"{self.title} ends with a GEMM or a store in flight")
        except _Over:
            pass
        except BaseException as error:
            MACHINE.failure = error
        self.done = True
        MACHINE.back.release()

    def tell(self, clock: Clock) -> None:
        """All that this partition has done and knows to be done; what it does from now on is later."""
        clock.learn(self.clock)
        self.clock[self.title] += 1

    def pause(self, ready: Callable[[], bool] = lambda: True, awaits: str = "its turn") -> None:
        """Let others run, until `ready`."""
        self.ready, self.awaits = ready, awaits
        MACHINE.back.release()
        self.go.acquire()
        if MACHINE.over:
            raise _Over


class Program:
    def __init__(self, number: int) -> None:
        self.number, self.named = number, {}


class Machine:
    """Runs what can run, one at a time, in an order drawn by `seed`."""

    def __init__(self, programs: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.programs = [Program(number) for number in range(programs)]
        self.partitions: list[Partition] = []
        self.copies: list[tuple[Callable[[], None], float]] = []
        self.slots: list[Slot] = []
        self.current: Partition | None = None
        self.failure: BaseException | None = None
        self.over, self.back = False, threading.Semaphore(0)

    def start(self, program: Program, title: str, work: Callable[[], None], warps: int) -> None:
        partition = Partition(program, f"{title} of program {program.number}", work, warps)
        partition.speed = 2 ** self.random.uniform(-3, 3)
        self.partitions.append(partition)

    def copy(self, lands: Callable[[], None]) -> None:
        """A copy that lands soon, or when nothing else can happen."""
        self.copies.append((lands, 2 ** self.random.uniform(-12, 3)))

    def run(self) -> None:
        try:
            while any(not each.done for each in self.partitions):
                ready = [each for each in self.partitions if not each.done and each.ready()]
                if not ready and not self.copies:
                    waiting = "; ".join(f"{each.title} awaits {each.awaits}" for each in self.partitions if not each.done)
                    raise Error(f"nobody can go on: {waiting}")
                weights = [each.speed for each in ready] + [speed for _, speed in self.copies]
                chosen = self.random.choices([*ready, *self.copies], weights)[0]
                if not isinstance(chosen, Partition):
                    self.copies.remove(chosen)
                    chosen[0]()
                    continue
                self.current = chosen
                chosen.go.release()
                self.back.acquire()
                if self.failure:
                    raise self.failure
            if self.copies:
                raise Error("the kernel ends with a copy in flight")
            for program in self.programs:
                for number, barrier in program.named.items():
                    if barrier.arrivals:
                        raise Error(f"named barrier {number} is left with the arrivals of {', '.join(barrier.arrivals)}")
        finally:
            self.over = True
            for each in self.partitions:
                if not each.done:
                    each.go.release()
            for each in self.partitions:
                each.thread.join()


MACHINE: Machine = None
"""The one that runs."""


def pause(ready: Callable[[], bool] = lambda: True, awaits: str = "its turn") -> None:
    """Let others run, until `ready`."""
    MACHINE.current.pause(ready, awaits)
