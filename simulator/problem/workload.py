"""Workload: what attention is asked to compute, its exact FLOPs and its compulsory bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError, did_you_mean
from ..values import flag, shown, text

DTYPE_BYTES = {"fp16": 2, "bf16": 2, "e4m3": 1}
"""Bytes per element of Q, K and V."""
_DTYPE_SYNONYMS = {"fp8": "e4m3", "float8_e4m3fn": "e4m3", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}

LSE_BYTES = 4
"""The log-sum-exp (and FlashAttention-1's l and m, and the backward's delta) is fp32."""

DIRECTIONS = ("forward", "backward")
GEMMS = {"forward": 2, "backward": 5}
"""Over all unmasked pairs: S and O; S again, dP, dV, dK and dQ (FlashAttention-2 section 4.1: 2.5 times the FLOPs)."""

MOST = {"batch": 1 << 24, "heads": 1 << 20, "kv_heads": 1 << 20, "seqlen_q": 1 << 31, "seqlen_k": 1 << 31, "head_dim": 1 << 12}
"""The most of each size: far beyond any kernel, and products of them stay exact. What can be replayed is less: limits.py."""


@dataclass(frozen=True)
class Workload:
    """One attention call, forward or backward: Q (batch, seqlen_q, heads, head_dim), K and V (batch, seqlen_k, kv_heads, head_dim).

    `seqlen` sets both lengths at once; `kv_heads` defaults to `heads` (GQA and MQA set it lower). A causal mask is
    bottom-right aligned: query i sees keys 0 .. i + seqlen_k - seqlen_q. Outputs are O, shaped as Q (fp16, bf16; bf16
    for e4m3 inputs), and LSE, (batch, heads, seqlen_q) in fp32. The backward has these and dO as inputs, and dQ, dK and dV,
    shaped as Q, K and V, as outputs.

    Packed sequences of unequal lengths have `lengths`, queries and keys of each; `seqlen_q` and `seqlen_k` are then the longest,
    and tensors are as long as all of them together.

    Raises UsageError, one sentence, for any size, dtype or head count that is not possible.
    """

    batch: int
    heads: int
    seqlen: int | None = None
    head_dim: int = 128
    dtype: str = "fp16"
    causal: bool = False
    kv_heads: int | None = None
    seqlen_q: int | None = None
    seqlen_k: int | None = None
    direction: str = "forward"
    lengths: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if self.lengths is not None:
            self._pack()
        given = {"seqlen_q": self.seqlen_q, "seqlen_k": self.seqlen_k}
        for name, value in given.items():
            if value is None:
                if self.seqlen is None:
                    raise UsageError(f"{name} is missing: give seqlen, or seqlen_q and seqlen_k")
                object.__setattr__(self, name, self.seqlen)
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        for name, most in MOST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise UsageError(f"{name}={shown(value)} is not a whole number")
            if value <= 0:
                raise UsageError(f"{name}={shown(value)} must be positive")
            if value > most:
                raise UsageError(f"{name}={shown(value)} is more than is possible ({most:,})")
        if not isinstance(self.dtype, str) or self.dtype not in DTYPE_BYTES:
            nearest = did_you_mean(self.dtype if isinstance(self.dtype, str) else "", DTYPE_BYTES, _DTYPE_SYNONYMS)
            raise UsageError(f"dtype={shown(self.dtype)} is not supported ({', '.join(DTYPE_BYTES)}){nearest}")
        flag(self.causal, "causal")
        text(self.direction, "direction", DIRECTIONS)
        if self.heads % self.kv_heads:
            raise UsageError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        same = self.seqlen_q == self.seqlen_k and self.lengths is None
        object.__setattr__(self, "seqlen", self.seqlen_q if same else None)

    def _pack(self) -> None:
        """Lengths as pairs of whole numbers, and the sizes that follow from them."""
        listed = isinstance(self.lengths, (tuple, list)) and all(isinstance(each, (tuple, list)) for each in self.lengths)
        if not listed or not self.lengths or any(len(each) != 2 for each in self.lengths):
            raise UsageError("lengths are a pair of queries and keys for each sequence, of one at least")
        if self.direction != "forward":
            raise UsageError("packed sequences are predicted forward; the backward has one length")
        for length in (length for each in self.lengths for length in each):
            if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= MOST["seqlen_q"]:
                raise UsageError(f"length {shown(length)} of a sequence is not a whole number up to {MOST['seqlen_q']:,}")
        object.__setattr__(self, "lengths", tuple((q, k) for q, k in self.lengths))
        longest = {"seqlen_q": max(q for q, _ in self.lengths), "seqlen_k": max(k for _, k in self.lengths)}
        if 0 in longest.values():
            raise UsageError("no sequence has a query, or none has a key: give one that has both")
        if self.seqlen is not None or self.batch != len(self.lengths):
            raise UsageError(f"lengths are of {len(self.lengths)} sequences: give that as batch, and no seqlen beside it")
        for name, length in longest.items():
            if getattr(self, name) not in (None, length):
                raise UsageError(f"{name}={getattr(self, name)} and the longest of the sequences is {length}: leave it out")
            object.__setattr__(self, name, length)

    @property
    def element_bytes(self) -> int:
        """Bytes per element of Q, K and V."""
        return DTYPE_BYTES[self.dtype]

    @property
    def output_bytes(self) -> int:
        """Bytes per element of O: as the inputs, but bf16 for e4m3 inputs (FlashAttention-3 section 3.3)."""
        return max(2, self.element_bytes)

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share one K/V head (1 is MHA, heads is MQA)."""
        return self.heads // self.kv_heads

    @property
    def sequences(self) -> Iterable[tuple[int, int]]:
        """Queries and keys of each sequence; one for all where they are alike."""
        return self.lengths or ((self.seqlen_q, self.seqlen_k),)

    @property
    def of_each(self) -> int:
        """How many sequences there are of each of `sequences`."""
        return 1 if self.lengths else self.batch

    @property
    def total_q(self) -> int:
        """Queries of all sequences."""
        return self.of_each * sum(q for q, _ in self.sequences)

    @property
    def total_k(self) -> int:
        """Keys of all sequences."""
        return self.of_each * sum(k for _, k in self.sequences)

    def lengths_of(self, q_heads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Queries and keys of the sequence that each query head, numbered batch * heads + head, is of."""
        if self.lengths is None:
            return np.full(len(q_heads), self.seqlen_q, np.int64), np.full(len(q_heads), self.seqlen_k, np.int64)
        queries, keys = np.array(self.lengths, np.int64).T
        return queries[q_heads // self.heads], keys[q_heads // self.heads]

    @property
    def pairs(self) -> int:
        """Unmasked (query, key) pairs of one head; of packed sequences, of one head of all of them."""
        return sum(_pairs(queries, keys, self.causal) for queries, keys in self.sequences)

    @property
    def all_pairs(self) -> int:
        """Unmasked pairs of all heads and sequences."""
        return self.pairs * self.heads * self.of_each

    @property
    def flops(self) -> int:
        """Exact FLOPs of the GEMMs over unmasked pairs: 4 * pairs * head_dim * heads * batch, of the backward 10."""
        return self.flops_per_pair * self.all_pairs

    @property
    def flops_per_pair(self) -> int:
        """FLOPs of one unmasked (query, key) pair: 2 * head_dim in each GEMM."""
        return 2 * GEMMS[self.direction] * self.head_dim

    @property
    def backward(self) -> bool:
        """Whether it is the backward."""
        return self.direction == "backward"

    @property
    def paper_flops(self) -> float:
        """FLOPs as the papers count them: 4 * S_q * S_k * D * H * B, halved when causal; of the backward 2.5 times as many
        (FlashAttention-2 section 4.1)."""
        full = self.flops_per_pair * sum(q * k for q, k in self.sequences) * self.heads * self.of_each
        return full / 2 if self.causal else float(full)

    @property
    def tensor_bytes(self) -> dict[str, int]:
        """Whole size in bytes of each tensor: Q, K, V (inputs), O, LSE (outputs); of the backward also dO, dQ, dK, dV."""
        q = self.total_q * self.heads * self.head_dim
        kv = self.total_k * self.kv_heads * self.head_dim
        gradients = {"dO": q, "dQ": q, "dK": kv, "dV": kv} if self.backward else {}
        return {
            "Q": q * self.element_bytes,
            "K": kv * self.element_bytes,
            "V": kv * self.element_bytes,
            "O": q * self.output_bytes,
            "LSE": self.total_q * self.heads * LSE_BYTES,
        } | {name: elements * self.output_bytes for name, elements in gradients.items()}

    @property
    def compulsory_read_bytes(self) -> int:
        """Bytes that any kernel has to read: K, V, and the rows of Q that see a key (and of dO), each once."""
        blind = self.of_each * sum(max(0, q - k) for q, k in self.sequences) if self.causal else 0
        whole = self.tensor_bytes
        rows = whole["Q"] + whole.get("dO", 0)
        return rows // self.total_q * (self.total_q - blind) + whole["K"] + whole["V"]

    @property
    def compulsory_write_bytes(self) -> int:
        """Bytes that any kernel has to write: all of O, or of dQ, dK and dV."""
        whole = self.tensor_bytes
        return whole["dQ"] + whole["dK"] + whole["dV"] if self.backward else whole["O"]

    def to_dict(self) -> dict:
        """The workload's fields as plain JSON values; the direction where it is not forward, lengths where they are not alike."""
        sizes = {
            "batch": self.batch,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "seqlen_q": self.seqlen_q,
            "seqlen_k": self.seqlen_k,
            "head_dim": self.head_dim,
            "dtype": self.dtype,
            "causal": self.causal,
        }
        sizes |= {"direction": self.direction} if self.backward else {}
        return sizes | ({"lengths": [list(each) for each in self.lengths]} if self.lengths else {})

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.kv_heads == self.heads else f"{self.heads}/{self.kv_heads}"
        length = f"{self.seqlen_q}" if self.seqlen_q == self.seqlen_k else f"{self.seqlen_q}q/{self.seqlen_k}k"
        if self.lengths:
            length = f"up to {length} ({self.total_q:,} tokens)"
        mask, last = "causal" if self.causal else "full", ", backward" if self.backward else ""
        return f"{self.batch} x {heads} x {length}, d{self.head_dim}, {self.dtype}, {mask}{last}"


def _pairs(queries: int, keys: int, causal: bool) -> int:
    """Unmasked pairs of one head of a sequence."""
    if not causal:
        return queries * keys
    offset = keys - queries
    first = max(0, -offset)  # rows before `first` see no key
    lowest, highest = first + offset + 1, queries + offset
    return (queries - first) * (lowest + highest) // 2
