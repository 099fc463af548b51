// The sequences of a packed batch, as prepare.cu lists them for the kernel that walks their tiles.
#pragma once
#include "ptx.cuh"

// Those with the most keys stand first, so that what is drawn last is short.
struct alignas(32) Sequence {
  int first;    // number of its first tile; a sequence without queries has no tile and the next one's number
  int index;    // which it is in cu_seqlens, and in the arrays of tensor maps
  int m_tiles;  // of one head
  int section;  // heads walked together, as in simulator/problem/order.py, "longest-first"
  int queries, keys;
  int start;  // row of its first query
};

// One tensor map of each sequence: it begins and ends where the sequence does, so what TMA reads past the end is zero and what it
// would write there is left out.
struct Maps {
  const TensorMap* of;
};
