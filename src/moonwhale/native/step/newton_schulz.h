// Muon's iteration for small matrices, as `newton_schulz` in optim/muonclip.py computes it: a matrix stays in a core's
// caches for all steps. Numbers are bf16 and sums fp32.
#pragma once
#include "matrix_units.h"
#include "training.h"

constexpr float NEWTON_SCHULZ[] = {3.4445f, -4.7750f, 2.0315f}; // as in muonclip.py

struct Stack { // matrices (n, rows, columns), computed with sizes that are multiples of 32
  int64_t n, rows, columns;
  long all_rows() const { return padded(rows); }
  long all_columns() const { return padded(columns); }
  long shorter() const { return std::min(all_rows(), all_columns()); }
  static long padded(long size) { return (size + SQUARE - 1) / SQUARE * SQUARE; }
};

struct MatrixScratch { // of one thread
  Array<bf16> x, left, right, gram, packed_gram;
  Array<float> sums, gram_sums;
  explicit MatrixScratch(const Stack &s)
      : x{s.all_rows(), s.all_columns()}, left{s.all_rows(), s.all_columns()}, right{s.all_rows(), s.all_columns()},
        gram{s.shorter(), s.shorter()}, packed_gram{s.shorter(), s.shorter()}, sums{s.all_rows(), s.all_columns()},
        gram_sums{s.shorter(), s.shorter()} {}
};

// x = a x + (b G + c G²) x for the Gram matrix G = x xᵀ, or a x + x (b G + c G²) for G = xᵀ x if that is smaller
static void newton_schulz_step(const MatrixScratch &own, const Stack &s) {
  const auto [a, b, c] = NEWTON_SCHULZ;
  const long rows = s.all_rows(), columns = s.all_columns(), shorter = s.shorter(), longer = std::max(rows, columns);
  const bool tall = rows > columns;
  if (tall) {
    pack_columns(own.left, own.x, 0, rows, rows, columns);
    pack_rows(own.right, own.x, 0, rows, rows, columns);
  } else pack_transposed(own.right, own.x, rows, columns);
  const Left left = tall ? tiled_rows(own.left, rows) : plain_rows(own.x, columns);
  unit_product(own.gram_sums, shorter, left, own.right, shorter, longer, shorter);
  round_to_bf16(own.gram, own.gram_sums, shorter * shorter);
  pack_transposed(own.packed_gram, own.gram, shorter, shorter); // a symmetric matrix is its own transpose
  unit_product(own.gram_sums, shorter, plain_rows(own.gram, shorter), own.packed_gram, shorter, shorter, shorter);
  for (long i = 0; i < shorter * shorter; i += LANES)
    put(own.gram + i, load(own.gram + i) * b + load(own.gram_sums + i) * c);
  if (tall) {
    pack_transposed(own.packed_gram, own.gram, shorter, shorter);
    unit_product(own.sums, columns, plain_rows(own.x, columns), own.packed_gram, rows, columns, columns);
  } else {
    pack_rows(own.right, own.x, 0, rows, rows, columns);
    unit_product(own.sums, columns, plain_rows(own.gram, rows), own.right, rows, rows, columns);
  }
  for (long i = 0; i < rows * columns; i += LANES) put(own.x + i, load(own.x + i) * a + load(own.sums + i));
}

// out (n, rows, columns)
static void newton_schulz(bf16 *out, const float *matrices, const Stack &s, long steps, int threads) {
  std::vector<MatrixScratch> scratch;
  for (int i = 0; i < threads; i++) scratch.emplace_back(s);
#pragma omp parallel num_threads(threads)
  {
    const Units units;
    const MatrixScratch &own = scratch[omp_get_thread_num()];
#pragma omp for
    for (long i = 0; i < s.n; i++) {
      const float *matrix = matrices + i * s.rows * s.columns;
      Vector squares = {};
      each_vector(s.rows * s.columns, [&](long at, auto part) {
        Vector some = get(matrix + at, part);
        squares += some * some;
      });
      const float scale = 1 / std::max(std::sqrt(sum(squares)), 1e-7f);
      std::memset(own.x, 0, s.all_rows() * s.all_columns() * sizeof(bf16));
      for (long r = 0; r < s.rows; r++)
        each_vector(s.columns, [&](long c, auto part) {
          put(own.x + r * s.all_columns() + c, get(matrix + r * s.columns + c, part) * scale, part);
        });
      for (long step = 0; step < steps; step++) newton_schulz_step(own, s);
      for (long r = 0; r < s.rows; r++)
        std::memcpy(out + (i * s.rows + r) * s.columns, own.x + r * s.all_columns(), s.columns * sizeof(bf16));
    }
  }
}
