"""The workloads of power.py: kernels of power.cu and power_streams.cu, their operands, and what one unit of each moves."""

from dataclasses import dataclass

from .harness import HERE, SM_COUNT_H200, tensor_map_2d
from .ptx import PRELUDE, wgmma_wrapper, wgmma_wrappers

KIBIBYTE, MEBIBYTE = 1 << 10, 1 << 20
TILE_BYTES = 32 * KIBIBYTE
SMEM_BYTES = 6 * TILE_BYTES  # Q and five stages
UNIT_TILES = 4
GEMM_CYCLES = 512  # m64n128k128 of one warpgroup
REPEATED_CYCLES = 2 * 8 * 88  # two warpgroups' m64n176k128
A_AND_B_BYTES, B_BYTES = 48 * KIBIBYTE, 32 * KIBIBYTE
MIXED_BYTES = (A_AND_B_BYTES + B_BYTES) // 2
"""Shared memory that a GEMM reads: A and B, B alone where A is in registers, the mean of both."""
FREE, TOGETHER, TURNS, ALONE = range(4)


@dataclass(frozen=True)
class Workload:
    """A kernel and how it is launched; `unit_*` are the work of one unit on one SM."""

    kernel: str
    threads: int = 384
    duty: float = 1.0
    seconds: float = 2.0
    units: int = 1  # in a burst
    window: int = 16 * MEBIBYTE
    groups: int = 4  # CTAs of one read the same tiles in step
    skew: int = 0  # tiles between the starts of its CTAs
    company: int = 0  # of the two warpgroups: power_streams.cu's enum Company
    data: str = "fp16"
    unit_tensor_cycles: int = 0
    unit_smem_bytes: int = 0
    unit_l2_bytes: int = 0
    unit_hbm_bytes: int = 0


def _stream(kernel, tile_smem_bytes, duty, apart=False, resident=False, company=None, **more):
    """GEMMs on tiles from L2; in step as four heads, or `apart`, every SM at another tile."""
    order = {"groups": 1, "skew": 31} if apart else {}
    moved = 0 if resident else UNIT_TILES * TILE_BYTES
    company = (TOGETHER if duty < 1 else FREE) if company is None else company
    warpgroups = 1 if company == ALONE else 2
    cost = {
        "unit_tensor_cycles": UNIT_TILES * GEMM_CYCLES * warpgroups,
        "unit_smem_bytes": UNIT_TILES * tile_smem_bytes * warpgroups + moved,
        "unit_l2_bytes": moved,
    }
    return Workload(kernel, duty=duty, seconds=3.0 if duty > 0.6 else 2.0, company=company, **cost, **order, **more)


def _loads(duty, **order):
    moved = UNIT_TILES * TILE_BYTES
    return Workload("stream_loads", 32, duty, units=2, unit_smem_bytes=moved, unit_l2_bytes=moved, **order)


APART = {"groups": 1, "skew": 31}
WORKLOADS = {"sleep": Workload("sleep", 256, 0.01)}
WORKLOADS |= {f"attention_{duty}": _stream("stream_attention", MIXED_BYTES, duty) for duty in (1.0, 0.75, 0.5, 0.25, 0.1)}
WORKLOADS |= {
    "attention_long_bursts_0.5": _stream("stream_attention", MIXED_BYTES, 0.5, units=16),
    **{f"attention_turns_{duty}": _stream("stream_attention", MIXED_BYTES, duty, company=TURNS) for duty in (1.0, 0.5)},
    **{f"attention_alone_{duty}": _stream("stream_attention", MIXED_BYTES, duty, company=ALONE) for duty in (1.0, 0.5)},
    **{f"attention_apart_{duty}": _stream("stream_attention", MIXED_BYTES, duty, apart=True) for duty in (1.0, 0.5)},
    **{f"attention_bf16_{duty}": _stream("stream_attention_bf16", MIXED_BYTES, duty, data="bf16") for duty in (1.0, 0.5)},
    **{f"attention_resident_{duty}": _stream("resident_attention", MIXED_BYTES, duty, resident=True) for duty in (1.0, 0.5)},
    "attention_zeros_1.0": _stream("stream_attention", MIXED_BYTES, 1.0, data="zeros"),
    **{f"qk_{duty}": _stream("stream_qk", A_AND_B_BYTES, duty) for duty in (1.0, 0.5)},
    **{f"qk_from_registers_{duty}": _stream("stream_qk_from_registers", B_BYTES, duty, data="queries") for duty in (1.0, 0.5)},
    **{f"pv_{duty}": _stream("stream_pv", B_BYTES, duty) for duty in (1.0, 0.5)},
    **{
        f"beside_softmax_{duty}": _stream("stream_attention_beside_softmax", MIXED_BYTES, duty, threads=512)
        for duty in (1.0, 0.5)
    },
    **{f"loads_in_step_{duty}": _loads(duty) for duty in (1.0, 0.5)},
    **{f"loads_apart_{duty}": _loads(duty, **APART) for duty in (1.0, 0.5)},
    "loads_from_hbm_0.5": _loads(0.5, groups=SM_COUNT_H200, window=2048 * MEBIBYTE),
    "hbm_copy": Workload("hbm_copy", 1024, units=20, window=2048 * MEBIBYTE, unit_hbm_bytes=2 * 8 * 16 * 1024),
    "softmax": Workload("softmax_all", 256, units=20),
    "softmax_exp": Workload("softmax_exp", 256, units=20),
    "softmax_rest": Workload("softmax_rest", 256, units=20),
    "smem_read": Workload("smem_read", 512, units=20, unit_smem_bytes=32 * 16 * 512),
    "repeated_gemm_1.0": Workload(
        "repeated_gemm", 256, seconds=3.0, units=20, unit_tensor_cycles=REPEATED_CYCLES,
        unit_smem_bytes=REPEATED_CYCLES // 88 * (64 + 176) * 16 * 2,
    ),
}  # fmt: skip


def source():
    """The whole CUDA source."""
    k_major = _variant("WgmmaKMajor", "p, 1, 1, 1;", "p, 1, 1, 0;")  # A in registers, B as for QK^T
    bf16 = _variant("WgmmaBf16", "f16.f16", "bf16.bf16")
    parts = [(HERE / part).read_text() for part in ("gemm.cuh", "softmax.cuh", "power.cu", "power_streams.cu")]
    return PRELUDE + wgmma_wrappers((128, 176)) + k_major + bf16 + "".join(parts)


def _variant(name, old, new):
    return f"template <int N> struct {name};\n" + wgmma_wrapper(128).replace("Wgmma<", f"{name}<").replace(old, new)


class Data:
    """Operands on the device: tiles of random normal data of each kind, and fragments of A for registers."""

    def __init__(self, mebibytes=2048, copy=True):
        import torch

        torch.manual_seed(0)
        rows = (16 * MEBIBYTE + TILE_BYTES) // 128
        normal = torch.randn((rows, 64), device="cuda")
        self.tiles = {"fp16": normal.half(), "bf16": normal.bfloat16(), "zeros": torch.zeros_like(normal).half()}
        self.tiles["queries"] = self.tiles["fp16"]
        scores = torch.randn((48, 256, 2), device="cuda")
        weights = torch.exp(scores - 3.7).clamp(max=1)  # softmax before its sum: below the largest of some thousand
        self.fragments = {
            "fp16": weights.half(), "bf16": weights.bfloat16(), "zeros": torch.zeros_like(weights).half(), "queries": scores.half(),
        }  # fmt: skip
        self.large = torch.randn(((mebibytes * MEBIBYTE + TILE_BYTES) // 128, 64), device="cuda", dtype=torch.float16)
        self.copied = torch.cat((self.large, self.large)) if copy else None

    def args(self, workload):
        """(data, tensor map, fragments) of a workload."""
        data = self.large if workload.window > 16 * MEBIBYTE else self.tiles[workload.data]
        described = tensor_map_2d(data, 128, 64)
        return self.copied if workload.kernel == "hbm_copy" else data, described, self.fragments[workload.data]


def launcher(module, workload, data):
    """A function of (log, bursts, sleep_ns) that enqueues one launch."""
    operands, described, fragments = data.args(workload)

    def launch(log, bursts, sleep_ns):
        args = [log, operands, workload.window, bursts, workload.units, sleep_ns, described, fragments]
        args += [workload.groups, workload.skew, workload.company]
        module.launch(workload.kernel, SM_COUNT_H200, workload.threads, args, SMEM_BYTES)

    return launch
