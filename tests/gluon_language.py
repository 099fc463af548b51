"""Runs the Gluon kernels' own source on the CPU, for test_gluon_order.py: Triton has no interpreter for Gluon.

Every function of a rung is executed as the Python that it is, on numpy, one thread a partition; what Triton and Gluon give is
replaced by what a GPU does with it (gluon_machine.py).
"""

from __future__ import annotations

import builtins
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gluon_machine as hardware
import gluon_ptx as ptx
import numpy as np
from gluon_machine import (
    TYPES,
    WARP,
    Barrier,
    Barriers,
    DType,
    Error,
    Named,
    Product,
    Slot,
    Tensor,
    View,
    Whole,
    made,
    pause,
    values_of,
)


def _running() -> hardware.Machine:
    return hardware.MACHINE


class Pointer:
    """An address in device memory."""

    def __init__(self, memory: np.ndarray, at: object = 0) -> None:
        self.memory, self.at = memory, at

    def __add__(self, more: object) -> Pointer:
        return Pointer(self.memory, self.at + values_of(more))


class Map:
    """A tensor map: a tensor as [B, H, S, D] in boxes of rows of one head."""

    def __init__(self, values: np.ndarray, rows: int, dtype: DType) -> None:
        self.values, self.rows, self.dtype = values, rows, dtype
        self.block_type = SimpleNamespace(nbytes=2 * rows * values.shape[3])
        self.times = np.zeros(values.shape[:3], int)  # each row has been written


def _load(source: Map, corner: list[int], bar: Barrier, target: View) -> None:
    batch, head, row, _ = corner
    slot = target.slot
    slot.written("a load")
    slot.filling = True
    slot.values[:] = np.nan

    def lands() -> None:
        rows = source.values[batch, head, row : row + source.rows]
        slot.values.reshape(source.rows, -1)[:] = 0
        slot.values.reshape(source.rows, -1)[: len(rows)] = rows
        slot.filling = False
        bar.bytes -= source.block_type.nbytes
        bar.settle()

    _running().copy(lands)
    pause()


def _store_tile(target: Map, corner: list[int], source: View) -> None:
    batch, head, row, _ = corner
    slot, who = source.slot, _running().current
    if slot.unfenced:
        raise Error("TMA stores a tile whose writes no fence has made visible to it")
    source.read()
    slot.readers.append("a store by TMA")
    who.stores += 1

    def lands() -> None:
        place = target.values[batch, head, row : row + target.rows]
        place[:] = slot.values.reshape(target.rows, -1)[: len(place)]
        target.times[batch, head, row : row + target.rows] += 1
        slot.readers.remove("a store by TMA")
        who.stores -= 1

    _running().copy(lands)
    pause()


def _await_stores(left: int) -> None:
    who = _running().current
    pause(lambda: who.stores <= left, "its stores")


def _fence() -> None:
    for slot in _running().slots:
        if slot.unfenced is _running().current:
            slot.unfenced = None


def _wait(bar: Barrier, phase: int) -> None:
    """Until the phase of this parity is over (PTX ISA, mbarrier.try_wait.parity)."""
    pause(lambda: bar.phase & 1 != phase, f"an mbarrier in phase {bar.phase} for parity {phase}")
    _running().current.clock.learn(bar.clock)


def _arrive(bar: Barrier, count: int) -> None:
    bar.arrived(count)
    pause()


def _init(bar: Barrier, count: int) -> None:
    bar.count = bar.pending = count


def _multiply(a: object, b: View, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Product:
    product = Product(a, b, acc, use_acc)
    _running().current.products.append(product)
    pause()
    return product


def _await_products(left: int, deps: list) -> object:
    mine = _running().current.products
    pause()
    while len(mine) > left:
        mine.pop(0).finish()
    done = []
    for each in deps:
        if isinstance(each, Product):
            if each.result is None:
                raise Error("the result of a GEMM is used before it is waited for")
            each = each.result
        done.append(each)
    return done[0] if len(done) == 1 else tuple(done)


def _assembly(text: str, constraints: str, given: list[Tensor], dtype: object, is_pure: bool, pack: int) -> object:
    """What the kernels say in PTX."""
    if at := re.match(r"bar\.(arrive|sync) \$1, (\d+);", text):
        who, number, threads = _running().current, int(given[0].values[0]), int(at[2])
        assert given[0].values.size == who.threads, "each thread says it once"
        barrier = who.program.named.setdefault(number, Named())
        mine = barrier.arrived(who, threads, number)
        if at[1] == "sync":
            pause(lambda: barrier.generation > mine, f"named barrier {number}")
            who.clock.learn(barrier.clock)
        else:
            pause()
        return given[0]
    if "bar.warp.sync" in text:
        return given[0]
    kinds = list(dtype) if isinstance(dtype, (list, tuple)) else [dtype]
    made = ptx.run(text, constraints, [each.values for each in given], pack)
    results = tuple(Tensor(values, kind) for values, kind in zip(made, kinds, strict=True))
    return results if len(results) > 1 else results[0]


def _store(pointer: Pointer, value: object, mask: object = None) -> None:
    if mask is None:
        pointer.memory[pointer.at] = value
    else:
        keep = mask.values
        pointer.memory[np.asarray(pointer.at)[keep]] = value.values[keep]


def _add(pointer: Pointer, value: int) -> Whole:
    was = Whole(pointer.memory[pointer.at])
    pointer.memory[pointer.at] += value
    pause()
    return was


def _allocate(dtype: DType, shape: list[int], layout: object) -> object:
    if dtype is TYPES["i64"]:
        return Barriers(shape[0])
    slots = [Slot(shape[1:], dtype) for _ in range(shape[0])]
    _running().slots.extend(slots)
    return View(slots, shape)


def _specialise(partitions: list, warps: list[int], registers: list[int]) -> None:
    program, started = _running().current.program, []
    for number, ((function, arguments), each) in enumerate(zip(partitions, [4, *warps], strict=True)):
        _running().start(program, f"partition {number}", lambda f=function, a=arguments: f(*a), each)
        started.append(_running().partitions[-1])
    pause(lambda: all(each.done for each in started), "its partitions")
    for each in started:
        _running().current.clock.learn(each.clock)


def _reduced(how: Callable) -> Callable:
    return lambda x, axis: made(how(x.values, axis))


def _either(how: Callable) -> Callable:
    def done(a, b):
        if isinstance(a, int) and isinstance(b, int):
            return Whole(how(a, b))
        return made(how(values_of(a), values_of(b)))

    return done


def _language() -> SimpleNamespace:
    nothing = lambda *_, **__: None  # noqa: E731
    return SimpleNamespace(
        constexpr=lambda x: x, tensor=None, shared_memory_descriptor=None,
        float32=TYPES["fp32"], bfloat16=TYPES["bf16"], float16=TYPES["fp16"],
        int16=TYPES["i16"], int32=TYPES["i32"], int64=TYPES["i64"],
        SliceLayout=nothing, BlockedLayout=nothing, NVMMASharedLayout=nothing, NVMMADistributedLayout=nothing,
        DotOperandLayout=nothing,
        num_warps=lambda: _running().current.threads // WARP,
        program_id=lambda _: Whole(_running().current.program.number), num_programs=lambda _: Whole(len(_running().programs)),
        static_range=lambda *a: map(Whole, builtins.range(*a)), cdiv=lambda a, b: (Whole(a) + b - 1) // b,
        zeros=lambda shape, dtype, *_: Tensor(dtype.rounded(np.zeros(shape)), dtype),
        full=lambda shape, value, dtype, *_: Tensor(dtype.rounded(np.full(shape, value)), dtype),
        arange=lambda a, b, layout=None: Tensor(np.arange(a, b, dtype=np.int32), TYPES["i32"]),
        convert_layout=lambda x, *_: x, reshape=lambda x, shape: Tensor(x.values.reshape(shape), x.dtype),
        expand_dims=lambda x, axis: Tensor(np.expand_dims(x.values, axis), x.dtype),
        split=lambda x: (Tensor(x.values[..., 0], x.dtype), Tensor(x.values[..., 1], x.dtype)),
        join=lambda a, b: Tensor(np.stack([a.values, b.values], -1), a.dtype),
        sum=_reduced(np.sum), max=_reduced(np.max), maximum=_either(np.maximum), minimum=_either(np.minimum),
        where=lambda test, a, b: made(np.where(test.values, np.float32(values_of(a)), np.float32(values_of(b)))),
        exp2=lambda x: made(np.exp2(x.values)), log2=lambda x: made(np.log2(x.values)),
        reduce=lambda x, axis, _: Tensor(np.take(x.values, 0, axis), x.dtype),  # the first: no other is asked for
        zeros_like=lambda x: made(np.zeros_like(x.values)),
        store=_store, atomic_add=_add, allocate_shared_memory=_allocate, warp_specialize=_specialise,
        inline_asm_elementwise=_assembly,
    )  # fmt: skip


def _hopper() -> SimpleNamespace:
    mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: None, init=_init, wait=_wait, arrive=_arrive, expect=lambda bar, size: bar.arrived(1, size)
    )
    return SimpleNamespace(
        mbarrier=mbarrier, fence_async_shared=_fence, warpgroup_mma=_multiply, warpgroup_mma_wait=_await_products,
        tma=SimpleNamespace(tensor_descriptor=None, async_load=_load, async_store=_store_tile, store_wait=_await_stores),
    )  # fmt: skip


class Source:
    """A rung's file and those that it imports, from `room`, or as `changed` has them (name -> text)."""

    def __init__(self, room: Path, changed: dict[str, str] | None = None) -> None:
        self.room, self.changed, self.loaded = room, changed or {}, {}
        jit = SimpleNamespace(jit=lambda f: f, constexpr_function=lambda f: f)
        self.given = {
            "triton.experimental": SimpleNamespace(gluon=SimpleNamespace(**vars(jit))),
            "triton.experimental.gluon": SimpleNamespace(language=_language()),
            "triton.experimental.gluon.language.nvidia.hopper": _hopper(),
            "triton.language.core": SimpleNamespace(_aggregate=lambda cls: cls),
        }

    def load(self, name: str) -> SimpleNamespace:
        if name not in self.loaded:
            text = self.changed.get(name) or (self.room / f"{name}.py").read_text(encoding="utf-8")
            words = {"__import__": self.found, "range": lambda *a: map(Whole, builtins.range(*a))}
            space = {"__builtins__": vars(builtins) | words, "__name__": name}
            exec(compile(text, name, "exec"), space)
            self.loaded[name] = SimpleNamespace(**space)
        return self.loaded[name]

    def found(self, name: str, globals=None, locals=None, fromlist=(), level=0) -> object:
        if level:
            return self.load(name)
        if name == "triton.language.core":  # as `import .. as` asks: the package first
            return SimpleNamespace(language=SimpleNamespace(core=self.given[name]))
        return self.given[name] if name in self.given else __import__(name, globals, locals, fromlist, level)


def run(
    source: Source, config: object, q: np.ndarray, k: np.ndarray, v: np.ndarray, section: int, programs: int, seed: int
) -> tuple:
    """(O [B, H, S_q, D], LSE [B, H, S_q]) of q like O, k and v [B, H_kv, S_k, D]; Error where the kernel's order is wrong."""
    kind = TYPES[config.dtype]
    batch, heads, seqlen_q, head_dim = q.shape
    kv_heads, seqlen_k = k.shape[1:3]
    m_tiles = -(-seqlen_q // config.block_m)
    tiles = m_tiles * batch * heads
    programs = tiles if config.one_partition else min(programs, tiles)
    o = Map(np.full(q.shape, np.nan, np.float32), config.q_rows, kind)
    lse, queue = np.full(batch * heads * seqlen_q, np.nan, np.float32), np.zeros(2, np.int64)
    given = {
        "q": Map(q, config.q_rows, kind), "k": Map(k, config.block_n, kind), "v": Map(v, config.block_n, kind), "o": o,
        "lse": Pointer(lse), "queue": Pointer(queue), "heads": heads, "sharing": heads // kv_heads, "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k, "m_tiles": m_tiles, "section": min(section, batch * heads), "tiles": tiles,
        "BLOCK_N": config.block_n, "HEAD_DIM": head_dim, "STAGES": config.stages, "CAUSAL": config.causal,
        "CONSUMERS": config.consumers, "MASKED": config.masked, "NAMED": config.named, "O_TILES": config.o_tiles,
        "CONSUMER_REGISTERS": 0, "PRODUCER_REGISTERS": 0,
    }  # fmt: skip
    given = {name: Whole(x) if type(x) is int else x for name, x in given.items()}
    given["scale_log2"] = float(np.log2(np.e) / np.sqrt(head_dim))
    hardware.MACHINE = hardware.Machine(programs, seed)
    kernel = source.load(config.schedule.replace("-", "_")).attention_forward
    names = inspect.signature(kernel).parameters
    for program in _running().programs:
        _running().start(program, "the kernel", lambda: kernel(*(given[name] for name in names)), config.num_warps)
    _running().run()
    if queue.any():
        raise Error(f"the queue is left at {queue.tolist()}")
    if not (o.times == 1).all():
        raise Error("some rows of O are written never or more than once")
    return o.values, lse.reshape(batch, heads, seqlen_q)
