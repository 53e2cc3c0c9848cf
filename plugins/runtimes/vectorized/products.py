"""Small matrix products as C++ of fixed shapes, in the place of a library's: what a step of K lanes is mostly made of.

A library's product is made for large matrices: it decides, packs and dispatches at every call, and gives 60 to 70 of a
core's 113 GFLOP/s on products of 32 x 64 x 64. Here every shape is a template argument, the tile of the result stays in
registers, and nothing is packed but a right-hand side that lies across (measured: 100 to 115 GFLOP/s; Goto and van de
Geijn, 2008, https://doi.org/10.1145/1356052.1356053, without the layers that only large matrices need).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# What is larger is the library's: there its packing pays.
_LARGEST_SIDE, _LARGEST_OPERAND = 1024, 1 << 17

SOURCE = """
#ifndef FEDTOWER_PRODUCTS
#define FEDTOWER_PRODUCTS
#include <torch/csrc/inductor/cpp_prefix.h>
#include <ATen/cpu/vec/vec.h>
namespace fedtower {
using V = at::vec::Vectorized<float>;
constexpr int W = V::size();
constexpr int ROWS = W == 16 ? 13 : 6;  // with two vectors a row: 26 or 12 registers of results, two of the right side

// C (R, J vectors, the last with TAIL numbers or whole) of R rows of A (R, K) and as many columns of B (K, ...).
template <int R, int J, int TAIL, int K, long AM, long AK, long BK, long CM>
inline void tile(const float* __restrict a, const float* __restrict b, float* __restrict c) {
  V sum[R][J];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < J; ++j) sum[i][j] = V(0.0f);
  for (int k = 0; k < K; ++k) {
    V right[J];
#pragma GCC unroll 2
    for (int j = 0; j < J; ++j)
      right[j] = TAIL && j == J - 1 ? V::loadu(b + k * BK + j * W, TAIL) : V::loadu(b + k * BK + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const V left(a[i * AM + k * AK]);
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) sum[i][j] = at::vec::fmadd(left, right[j], sum[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < J; ++j) {
      if (TAIL && j == J - 1) sum[i][j].store(c + i * CM + j * W, TAIL);
      else sum[i][j].store(c + i * CM + j * W);
    }
}

template <int M, int J, int TAIL, int K, long AM, long AK, long BK, long CM>
inline void columns(const float* a, const float* b, float* c) {
  // Rows in blocks that differ by one at most, so that the last one is not a thin one.
  constexpr int blocks = (M + ROWS - 1) / ROWS, few = M / blocks, more = M % blocks;
  int m = 0;
  if constexpr (more > 0)
    for (; m < more * (few + 1); m += few + 1) tile<few + 1, J, TAIL, K, AM, AK, BK, CM>(a + m * AM, b, c + m * CM);
  for (; m < M; m += few) tile<few, J, TAIL, K, AM, AK, BK, CM>(a + m * AM, b, c + m * CM);
}

// C (M, N) = A (M, K) B (K, N): A lies anyhow, the rows of B and C in one piece each.
template <int M, int N, int K, long AM, long AK, long BK, long CM>
inline void product(const float* a, const float* b, float* c) {
  constexpr int vectors = (N + W - 1) / W, last = (vectors - 1) % 2 + 1, before = (vectors - last) * W;
  for (int n = 0; n < before; n += 2 * W) columns<M, 2, 0, K, AM, AK, BK, CM>(a, b + n, c + n);
  columns<M, last, N % W, K, AM, AK, BK, CM>(a, b + before, c + before);
}

// B (K, N), whose columns are in one piece each, with rows of WIDTH in one piece each.
template <int K, int N, long BN, int WIDTH>
inline void turn(const float* b, float* out) {
  for (int n = 0; n < N; n += 16)
    for (int k = 0; k < K; k += 16) {
      const float* from = b + n * BN + k;
      float* to = out + k * WIDTH + n;
      if (n + 16 <= N && k + 16 <= K) at::vec::transpose_mxn<float, 16, 16>(from, BN, to, WIDTH);
      else at::vec::transpose_mxn<float>(from, BN, to, WIDTH, N - n < 16 ? N - n : 16, K - k < 16 ? K - k : 16);
    }
}
}  // namespace fedtower
#endif
"""


def is_small(m: int, k: int, n: int) -> bool:
    """Whether a product of (M, K) and (K, N) is better made by :data:`SOURCE`. One with a vector is bound by memory:
    the compiler makes a sum of it, in one loop with what is around it.
    """
    return min(m, n) > 1 and max(m, n, k) <= _LARGEST_SIDE and max(m * k, k * n) <= _LARGEST_OPERAND


@dataclass(frozen=True)
class Operand:
    """A matrix (or one of every lane) as it lies in memory: ``size`` and ``stride`` in numbers, (lanes, ...) or (...).

    ``place`` is C++ for the address of its first number.
    """

    place: str
    size: Sequence[int]
    stride: Sequence[int]

    @property
    def lane(self) -> int:
        """How far it is from one lane to the next, 0 if all share it."""
        return self.stride[0] if len(self.size) == 3 else 0

    @property
    def turned(self) -> Operand:
        """The transpose, in the same place."""
        *lanes, m, n = range(len(self.size))
        order = [*lanes, n, m]
        return Operand(self.place, [self.size[i] for i in order], [self.stride[i] for i in order])


def is_crossed(left: Operand, right: Operand) -> bool:
    """Whether it is better to make (B' A')' of A B, with the columns of the result in one piece each: nothing has to be
    turned then.
    """
    return right.stride[-1] != 1 and left.stride[-2] == 1


def body(left: Operand, right: Operand, out: Operand) -> str:
    """C++ statements for ``out = left @ right`` in every lane; the rows of ``out``, or if the product
    :func:`is_crossed` its columns, are in one piece each.
    """
    if is_crossed(left, right):
        left, right, out = right.turned, left.turned, out.turned
    lanes = out.size[0] if len(out.size) == 3 else 1
    (m, k), n, (am, ak), (bk, bn) = left.size[-2:], right.size[-1], left.stride[-2:], right.stride[-2:]
    rows, before, within = f"b + lane * {right.lane}L", "", ""
    if bn != 1:
        width = -(-n // 16) * 16
        turn = f"fedtower::turn<{k}, {n}, {bn}L, {width}>({{}}, turned);"
        before = f"alignas(64) static thread_local float turned[{k * width}];"
        if right.lane:
            within = turn.format(rows)
        else:
            before += " " + turn.format("b")
        bk, rows = width, "turned"
    return f"""
  const float* a = {left.place};
  const float* b = {right.place};
  float* c = {out.place};
  {before}
  for (long lane = 0; lane < {lanes}; ++lane) {{
    {within}
    fedtower::product<{m}, {n}, {k}, {am}L, {ak}L, {bk}L, {out.stride[-2]}L>(
        a + lane * {left.lane}L, {rows}, c + lane * {out.lane}L);
  }}
"""
