// The routed experts of a training step, see RoutedExperts in model/routed.py: a block of rows passes both products of
// its expert while it is in the caches. Numbers are bf16, sums and the weights' gradients fp32.
#pragma once
#include "matrix_units.h"
#include "training.h"

constexpr long BLOCK_ROWS = 64; // as EXPERT_ROW_MULTIPLE in routed.py

static long first_row(const Routes &routes, long expert) { return expert ? routes.ends[expert - 1] : 0; }
static long size_of(const Routes &routes, long expert) { return routes.ends[expert] - first_row(routes, expert); }
static long expert_of(const Routes &routes, long row) {
  return std::upper_bound(routes.ends, routes.ends + routes.experts, row) - routes.ends;
}

// Whether all rows are inside the arrays. Throws if these would be too large.
static bool is_valid(const Routes &r) {
  if (!r.token || !r.row || !r.ends || !r.weight || r.tokens < 1 || r.chosen < 1 || r.experts < 1) return false;
  if (r.hidden < SQUARE || r.inner < SQUARE || r.hidden % SQUARE || r.inner % SQUARE) return false;
  count({r.tokens, r.chosen, r.hidden});
  count({r.experts, r.hidden, 2, r.inner});
  count({r.rows, r.hidden + 2 * r.inner});
  for (int64_t e = 0; e < r.experts; e++)
    if (r.ends[e] % BLOCK_ROWS || r.ends[e] < (e ? r.ends[e - 1] : 0)) return false;
  if (r.ends[r.experts - 1] != r.rows) return false;
  return std::all_of(r.token, r.token + r.rows, [&](int64_t n) { return is_within(n, 0, r.tokens - 1); }) &&
         std::all_of(r.row, r.row + r.tokens * r.chosen, [&](int64_t n) { return is_within(n, 0, r.rows - 1); });
}

// to (64, hidden): the tokens of a block of rows
static void gather(bf16 *to, const bf16 *x, const Routes &routes, long block) {
  for (long r = 0; r < BLOCK_ROWS; r++)
    std::memcpy(to + r * routes.hidden, x + routes.token[block + r] * routes.hidden, routes.hidden * sizeof(bf16));
}

// out (tokens, hidden): the sum of each token's rows
static void sum_pairs(bf16 *out, const bf16 *rows, const Routes &routes, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long t = 0; t < routes.tokens; t++)
    for (long i = 0; i < routes.hidden; i += LANES) {
      Vector total = {};
      for (long k = 0; k < routes.chosen; k++)
        total += load(rows + routes.row[t * routes.chosen + k] * routes.hidden + i);
      put(out + t * routes.hidden + i, total);
    }
}

struct BlockScratch { // of one thread, for a block of rows
  Array<bf16> in, d_product, product, d_inner;
  Array<float> wide;
  explicit BlockScratch(const Routes &r)
      : in{BLOCK_ROWS, r.hidden}, d_product{BLOCK_ROWS, r.inner}, product{BLOCK_ROWS, r.inner},
        d_inner{BLOCK_ROWS, 2, r.inner}, wide{BLOCK_ROWS, std::max(r.hidden, 2 * r.inner)} {}
};

// out (tokens, hidden), and `inner` (rows, 2 * inner): gates and values before the activation, for the gradient
static void routed_forward(bf16 *out, bf16 *inner, const bf16 *x, const bf16 *gate_up, const bf16 *down,
                           const Routes &routes, int threads) {
  const long hidden = routes.hidden, width = routes.inner, both = 2 * width;
  const Array<bf16> ups{routes.experts, both, hidden}, downs{routes.experts, hidden, width}, outs{routes.rows, hidden};
  std::vector<BlockScratch> scratch;
  for (int i = 0; i < threads; i++) scratch.emplace_back(routes);
#pragma omp parallel num_threads(threads)
  {
    const Units units;
    const BlockScratch &own = scratch[omp_get_thread_num()];
#pragma omp for
    for (long e = 0; e < routes.experts; e++) {
      pack_transposed(ups + e * both * hidden, gate_up + e * both * hidden, both, hidden);
      pack_transposed(downs + e * hidden * width, down + e * hidden * width, hidden, width);
    }
#pragma omp for
    for (long row = 0; row < routes.rows; row += BLOCK_ROWS) {
      const long e = expert_of(routes, row);
      bf16 *gates = inner + row * both;
      gather(own.in, x, routes, row);
      unit_product(own.wide, both, plain_rows(own.in, hidden), ups + e * both * hidden, BLOCK_ROWS, hidden, both);
      round_to_bf16(gates, own.wide, BLOCK_ROWS * both);
      for (long r = 0; r < BLOCK_ROWS; r++, gates += both)
        gate_row(own.product + r * width, gates, gates + width, routes.weight[row + r], width);
      unit_product(own.wide, hidden, plain_rows(own.product, width), downs + e * hidden * width, BLOCK_ROWS, width,
                   hidden);
      round_to_bf16(outs + row * hidden, own.wide, BLOCK_ROWS * hidden);
    }
  }
  sum_pairs(out, outs, routes, threads);
}

struct RoutedGradients {
  bf16 *x;                        // (tokens, hidden)
  float *gate_up, *down, *weight; // (experts, 2 * inner, hidden), (experts, hidden, inner), (rows)
};

// The rows of some experts as operands of the products that sum over rows
struct PackedRows {
  Array<bf16> x, d_out, d_inner, product;
  PackedRows(int64_t rows, const Routes &r)
      : x{rows, r.hidden}, d_out{rows, r.hidden}, d_inner{rows, 2, r.inner}, product{rows, r.inner} {}
};

// The gradients of a slice of 32 rows of an expert's matrices: of gate_up's, then of down's columns. Its packed rows
// begin at `at`.
static void weight_gradients(const RoutedGradients &d, const PackedRows &packed, const Routes &routes, long e, long at,
                             long slice) {
  const long hidden = routes.hidden, width = routes.inner, both = 2 * width, n = size_of(routes, e);
  if (slice < both / SQUARE) {
    const Left left = tiled_rows(packed.d_inner + at * both, n).below(slice * SQUARE);
    return unit_product(d.gate_up + (e * both + slice * SQUARE) * hidden, hidden, left, packed.x + at * hidden, SQUARE,
                        n, hidden);
  }
  const long first = slice * SQUARE - both;
  const Left left = tiled_rows(packed.product + at * width, n).below(first);
  for (long column = 0; column < hidden; column += SQUARE) {
    float square[SQUARE * SQUARE];
    square_product(square, SQUARE, left, packed.d_out + at * hidden + column * n, TILE_ROWS * n, n);
    for (long h = 0; h < SQUARE; h++)
      for (long i = 0; i < SQUARE; i++)
        d.down[(e * hidden + column + h) * width + first + i] = square[i * SQUARE + h];
  }
}

// The rows of the most that `experts` adjacent experts have
static int64_t most_rows(const Routes &routes, long experts) {
  int64_t most = 0;
  for (long e = 0; e < routes.experts; e += experts)
    most = std::max<int64_t>(most, routes.ends[std::min(e + experts, routes.experts) - 1] - first_row(routes, e));
  return most;
}

// A block of rows of an expert, which has the right operands `up` and `down`: d_rows (64, hidden) and the gradients of
// the rows' weights, and the rows packed. The expert's packed rows begin at `at`, the block is `first` rows after them.
static void block_gradients(const RoutedGradients &d, bf16 *d_rows, const PackedRows &packed, const bf16 *d_out,
                            const bf16 *x, const bf16 *inner, const bf16 *up, const bf16 *down, const Routes &routes,
                            long row, long at, long first, const BlockScratch &own) {
  const long hidden = routes.hidden, width = routes.inner, both = 2 * width;
  const long n = size_of(routes, expert_of(routes, row));
  gather(own.in, x, routes, row);
  pack_rows(packed.x + at * hidden, own.in, first, BLOCK_ROWS, n, hidden);
  gather(own.in, d_out, routes, row);
  pack_rows(packed.d_out + at * hidden, own.in, first, BLOCK_ROWS, n, hidden);
  unit_product(own.wide, width, plain_rows(own.in, hidden), down, BLOCK_ROWS, hidden, width);
  round_to_bf16(own.d_product, own.wide, BLOCK_ROWS * width);
  for (long r = 0; r < BLOCK_ROWS; r++) {
    const bf16 *gate = inner + r * both;
    bf16 *d_gate = own.d_inner + r * both;
    d.weight[row + r] = gate_row_backward(d_gate, d_gate + width, own.product + r * width, own.d_product + r * width,
                                          gate, gate + width, routes.weight[row + r], width);
  }
  pack_columns(packed.product + at * width, own.product, first, BLOCK_ROWS, n, width);
  pack_columns(packed.d_inner + at * both, own.d_inner, first, BLOCK_ROWS, n, both);
  unit_product(own.wide, hidden, plain_rows(own.d_inner, both), up, BLOCK_ROWS, both, hidden);
  round_to_bf16(d_rows, own.wide, BLOCK_ROWS * hidden);
}

// The gradients of routed_forward for d_out (tokens, hidden). As many experts at once as there are threads: their rows
// stay in the caches until they are summed.
static void routed_backward(const RoutedGradients &d, const bf16 *d_out, const bf16 *x, const bf16 *inner,
                            const bf16 *gate_up, const bf16 *down, const Routes &routes, int threads) {
  const long hidden = routes.hidden, width = routes.inner, both = 2 * width, slices = 3 * width / SQUARE;
  const Array<bf16> ups{routes.experts, both, hidden}, downs{routes.experts, hidden, width};
  const Array<bf16> d_rows{routes.rows, hidden};
  const PackedRows packed(most_rows(routes, threads), routes);
  std::vector<BlockScratch> scratch;
  for (int i = 0; i < threads; i++) scratch.emplace_back(routes);
#pragma omp parallel num_threads(threads)
  {
    const Units units;
#pragma omp for
    for (long e = 0; e < routes.experts; e++) {
      pack_rows(ups + e * both * hidden, gate_up + e * both * hidden, 0, both, both, hidden);
      pack_rows(downs + e * hidden * width, down + e * hidden * width, 0, hidden, hidden, width);
    }
    for (long next = 0; next < routes.experts; next += threads) {
      const long last = std::min<long>(next + threads, routes.experts), start = first_row(routes, next);
#pragma omp for
      for (long row = start; row < routes.ends[last - 1]; row += BLOCK_ROWS) {
        const long e = expert_of(routes, row), first = first_row(routes, e);
        block_gradients(d, d_rows + row * hidden, packed, d_out, x, inner + row * both, ups + e * both * hidden,
                        downs + e * hidden * width, routes, row, first - start, row - first,
                        scratch[omp_get_thread_num()]);
      }
#pragma omp for
      for (long i = next * slices; i < last * slices; i++)
        weight_gradients(d, packed, routes, i / slices, first_row(routes, i / slices) - start, i % slices);
    }
  }
  sum_pairs(d.x, d_rows, routes, threads);
}
