// Element-wise parts of a training step, each in one or two passes over memory: the same computations as RMSNorm
// (model/norm.py), the cross-entropy (loss.py), the gated activation (gated.py), the softmax (attention.py), and Muon's
// momentum and step (optim/muonclip.py). PyTorch makes a pass for every operation, with a temporary in memory between them.
//
// Numbers are fp32 or bf16 and intermediate values fp32. Rows are `step` numbers apart, numbers of a row adjacent.
// A result is the same to the last bit for any number of threads.
#pragma once
#include <cmath>
#include <vector>

#include "checks.h"
#include "products.h"

extern "C" int omp_get_thread_num(); // torch has loaded the library

constexpr long CHUNKS = 64; // of rows, whose parts of a weight's gradient are summed by themselves

struct All {}; // the LANES numbers of a whole vector
struct Some {  // the numbers after the last whole vector
  long n;
};

template <class T> INLINE Vector get(const T *x, All) { return load(x); }
template <class T> INLINE Vector get(const T *x, Some some) {
  T part[LANES] = {};
  std::memcpy(part, x, some.n * sizeof(T));
  return load(part);
}

INLINE void put(float *to, Vector x) { std::memcpy(to, &x, sizeof x); }
INLINE void put(bf16 *to, Vector x) { // rounds to nearest, ties to even; NaN stays NaN
  typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
  Bits bits = (Bits)x;
  bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  Halves halves = __builtin_convertvector(x == x ? bits : Bits{} + 0x7fc0, Halves);
  std::memcpy(to, &halves, sizeof halves);
}
INLINE void round_to_bf16(bf16 *to, const float *from, long n) { // n is a multiple of LANES
  for (long i = 0; i < n; i += LANES) put(to + i, load(from + i));
}
template <class T> INLINE void put(T *to, Vector x, All) { put(to, x); }
template <class T> INLINE void put(T *to, Vector x, Some some) {
  T part[LANES];
  put(part, x);
  std::memcpy(to, part, some.n * sizeof(T));
}

// Calls run(i, All) for whole vectors of n numbers, and run(i, Some) for the rest
template <class Run> INLINE void each_vector(long n, Run run) {
  long i = 0;
  for (; i + LANES <= n; i += LANES) run(i, All());
  if (i < n) run(i, Some{n - i});
}

INLINE Vector larger(Vector x, Vector y) { return x > y ? x : y; }
INLINE float largest_lane(Vector x) {
  float largest = x[0];
  for (int lane = 1; lane < LANES; lane++) largest = std::max(largest, x[lane]);
  return largest;
}

INLINE Vector fill_after(Vector x, All, float) { return x; }
INLINE Vector fill_after(Vector x, Some some, float value) { // the lanes that are no numbers of the array
  for (int lane = some.n; lane < LANES; lane++) x[lane] = value;
  return x;
}

// 2^n * e^z for |z| <= ln 2 / 2. The second factor is a Taylor series.
INLINE Vector power(Whole n, Vector z) {
  Vector y = z * (1.0f / 5040) + 1.0f / 720;
  y = y * z + 1.0f / 120;
  y = y * z + 1.0f / 24;
  y = y * z + 1.0f / 6;
  y = y * z + 0.5f;
  y = y * z + 1.0f;
  y = y * z + 1.0f;
  return y * (Vector)((n + 127) << 23);
}

// 2^x for x <= 0 to 2 units in the last place, and 0 where it is no normal number
INLINE Vector exp2_negative(Vector x) {
  Vector inside = x < -126.0f ? Vector{} - 126.0f : x; // NaN stays NaN
  Whole n = __builtin_convertvector(inside - 0.5f, Whole);
  return x < -126.0f ? Vector{} : power(n, (inside - __builtin_convertvector(n, Vector)) * 0.693147181f);
}

// e^x in the same way. n * ln 2 is subtracted in two parts, since one would round n * ln 2 itself.
INLINE Vector exp_negative(Vector x) {
  const Vector least = Vector{} - 87.3f;
  Vector inside = x < least ? least : x; // NaN stays NaN
  Whole n = __builtin_convertvector(inside * 1.44269504f - 0.5f, Whole);
  Vector whole = __builtin_convertvector(n, Vector), z = (inside - whole * 0.693359375f) + whole * 2.12194440e-4f;
  return x < least ? Vector{} : power(n, z);
}

INLINE Vector sigmoid(Vector x) {
  Vector e = exp_negative(x < 0 ? x : -x);
  return (x < 0 ? e : Vector{} + 1.0f) / (1.0f + e);
}

// Calls `run` with a null pointer of the type that `dtype` says
template <class Run> INLINE void with_type(Dtype dtype, Run run) {
  if (dtype == FP32) run((float *)nullptr);
  else run((bf16 *)nullptr);
}

static bool is_valid_table(int64_t rows, int64_t columns, int64_t step, Dtype dtype, int64_t threads) {
  return is_within(rows, 1, MAX_NUMBERS) && columns > 0 && is_within(dtype, FP32, BF16) &&
         is_within(threads, 1, MAX_THREADS) && count({rows, columns}) && count({rows, step}) >= 0;
}

// y = x * inverse * weight, where `inverse` (rows) is 1 / rms(x)
template <class T>
static void rms_norm_forward(T *y, float *inverse, const T *x, long step, const float *weight, long rows, long columns,
                             float eps, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long r = 0; r < rows; r++) {
    const T *in = x + r * step;
    T *out = y + r * columns;
    Vector square = {};
    each_vector(columns, [&](long i, auto part) {
      Vector some = get(in + i, part);
      square += some * some;
    });
    const float scale = inverse[r] = 1 / std::sqrt(sum(square) / columns + eps);
    each_vector(columns,
                [&](long i, auto part) { put(out + i, get(in + i, part) * scale * get(weight + i, part), part); });
  }
}

// d_x, and d_weight (columns) summed over rows
template <class T>
static void rms_norm_backward(T *d_x, float *d_weight, const T *d_y, long d_step, const T *x, long step,
                              const float *inverse, const float *weight, long rows, long columns, int threads) {
  const long chunks = std::min(rows, CHUNKS);
  std::vector<float> sums(chunks * columns);
#pragma omp parallel for num_threads(threads)
  for (long chunk = 0; chunk < chunks; chunk++) {
    float *own = &sums[chunk * columns];
    for (long r = rows * chunk / chunks; r < rows * (chunk + 1) / chunks; r++) {
      const T *in = x + r * step, *d_out = d_y + r * d_step;
      const float scale = inverse[r];
      Vector along = {};
      each_vector(columns, [&](long i, auto part) {
        Vector product = get(d_out + i, part) * (get(in + i, part) * scale);
        along += product * get(weight + i, part);
        put(own + i, get(own + i, part) + product, part);
      });
      const float mean = sum(along) / columns;
      each_vector(columns, [&](long i, auto part) {
        Vector d_normed = get(d_out + i, part) * get(weight + i, part);
        put(d_x + r * columns + i, (d_normed - get(in + i, part) * scale * mean) * scale, part);
      });
    }
  }
  std::fill_n(d_weight, columns, 0);
  for (long chunk = 0; chunk < chunks; chunk++)
    for (long i = 0; i < columns; i++) d_weight[i] += sums[chunk * columns + i];
}

// For each row of logits, `total`: the sum of exp(logit - largest), `nll`: the cross-entropy, and whether no logit is
// larger than the label's. With `gradient`, logits become total * d nll / d logits.
template <class T>
static void score_rows(T *logits, const int64_t *labels, float *total, float *nll, bool *correct, long rows,
                       long columns, bool gradient, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long r = 0; r < rows; r++) {
    T *row = logits + r * columns;
    const float at_label = number(row[labels[r]]);
    Vector largest = Vector{} + at_label, all = {};
    each_vector(columns, [&](long i, auto part) {
      largest = larger(fill_after(get(row + i, part), part, at_label), largest);
    });
    const float peak = largest_lane(largest);
    each_vector(columns, [&](long i, auto part) {
      Vector exponential = exp_negative(get(row + i, part) - peak);
      if (gradient) put(row + i, exponential, part);
      all += fill_after(exponential, part, 0);
    });
    total[r] = sum(all);
    nll[r] = std::log(total[r]) + (peak - at_label);
    correct[r] = at_label == peak && total[r] == total[r];
    if (gradient) {
      const float exponential = exp_negative(Vector{} + (at_label - peak))[0];
      store(row + labels[r], exponential - total[r]);
    }
  }
}

// A row of gate_forward
template <class T> INLINE void gate_row(T *product, const T *gate, const T *up, float scale, long columns) {
  each_vector(columns, [&](long i, auto part) {
    Vector x = get(gate + i, part);
    put(product + i, x * sigmoid(x) * get(up + i, part) * scale, part);
  });
}

// product = silu(gate) * up * row_weight. Without row weights they are 1.
template <class T>
static void gate_forward(T *product, const T *gate, const T *up, long step, const float *row_weight, long rows,
                         long columns, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long r = 0; r < rows; r++)
    gate_row(product + r * columns, gate + r * step, up + r * step, row_weight ? row_weight[r] : 1, columns);
}

// A row of gate_backward. `product` may be null. Returns the weight's gradient.
template <class T>
INLINE float gate_row_backward(T *d_gate, T *d_up, T *product, const T *d_product, const T *gate, const T *up,
                               float scale, long columns) {
  Vector along = {};
  each_vector(columns, [&](long i, auto part) {
    Vector x = get(gate + i, part), value = get(up + i, part);
    Vector d = get(d_product + i, part), share = sigmoid(x), activated = x * share;
    if (product) {
      Vector plain = activated * value;
      along += d * plain;
      put(product + i, plain * scale, part);
    }
    d *= scale;
    put(d_up + i, d * activated, part);
    put(d_gate + i, d * value * share * (1.0f + x * (1.0f - share)), part);
  });
  return sum(along);
}

// The gradients of gate_forward for d_product. With row weights also theirs, `d_weight` (rows), and `product` again.
template <class T>
static void gate_backward(T *d_gate, T *d_up, long d_step, float *d_weight, T *product, const T *d_product,
                          const T *gate, const T *up, long step, const float *row_weight, long rows, long columns,
                          int threads) {
#pragma omp parallel for num_threads(threads)
  for (long r = 0; r < rows; r++) {
    T *own = row_weight ? product + r * columns : nullptr;
    const float along = gate_row_backward(d_gate + r * d_step, d_up + r * d_step, own, d_product + r * columns,
                                          gate + r * step, up + r * step, row_weight ? row_weight[r] : 1, columns);
    if (row_weight) d_weight[r] = along;
  }
}

// What the queries of a tile see: scores (heads, queries, keys) of causal attention, in which the last query sees all
// keys, and of documents, in which it sees keys with its own id. Both are optional. ids: (heads, queries), (heads, keys).
struct Tile {
  long heads, queries, keys;
  bool causal;
  const int32_t *of_queries, *of_keys;
  long visible(long row) const { return causal ? keys - queries + row % queries + 1 : keys; }
  // The scores of a row from k on, and -infinity for keys of other documents and after the row's last key
  template <class T, class Part> INLINE Vector scores(const T *row_scores, long row, long k, Part part) const {
    Vector some = fill_after(get(row_scores + k, part), part, -INFINITY);
    if (!of_keys) return some;
    Whole ids = {};
    if constexpr (std::is_same_v<Part, All>) ids = read<Whole>(of_keys + row / queries * keys + k);
    else std::memcpy(&ids, of_keys + row / queries * keys + k, part.n * sizeof(int32_t));
    return ids == of_queries[row] ? some : Vector{} - INFINITY;
  }
};

// The scores, which are exponents of 2, become probabilities. `peak`: a row's largest score, `total`: the sum of powers
// relative to it, both (heads, queries). `scratch` (threads, keys rounded up to vectors).
template <class T>
static void softmax_rows(T *scores, float *peak, float *total, const Tile &tile, float *scratch, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long r = 0; r < tile.heads * tile.queries; r++) {
    T *row = scores + r * tile.keys;
    float *own = scratch + omp_get_thread_num() * whole_vectors(tile.keys);
    const long visible = tile.visible(r);
    Vector largest = Vector{} - INFINITY, all = {};
    each_vector(visible, [&](long k, auto part) {
      Vector some = tile.scores(row, r, k, part);
      put(own + k, some);
      largest = larger(some, largest);
    });
    peak[r] = largest_lane(largest);
    for (long k = 0; k < visible; k += LANES) {
      Vector power = exp2_negative(load(own + k) - peak[r]);
      put(own + k, power);
      all += power;
    }
    total[r] = sum(all);
    const float scale = 1 / total[r];
    each_vector(visible, [&](long k, auto part) { put(row + k, load(own + k) * scale, part); });
    std::memset(row + visible, 0, (tile.keys - visible) * sizeof(T));
  }
}

// The same probabilities from the logarithm (base 2) of each row's sum of powers
template <class T> static void probability_rows(T *scores, const float *log_sum, const Tile &tile, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long r = 0; r < tile.heads * tile.queries; r++) {
    T *row = scores + r * tile.keys;
    const long visible = tile.visible(r);
    each_vector(visible, [&](long k, auto part) {
      put(row + k, exp2_negative(tile.scores(row, r, k, part) - log_sum[r]), part);
    });
    std::memset(row + visible, 0, (tile.keys - visible) * sizeof(T));
  }
}

// d_probs becomes the scores' gradient: probs * (d_probs - out_dot) * scale
template <class T>
static void score_gradient_rows(T *d_probs, const T *probs, const float *out_dot, float scale, long rows, long columns,
                                int threads) {
#pragma omp parallel for num_threads(threads)
  for (long r = 0; r < rows; r++)
    each_vector(columns, [&](long k, auto part) {
      T *at = d_probs + r * columns + k;
      put(at, (get(at, part) - out_dot[r]) * scale * get(probs + r * columns + k, part), part);
    });
}

constexpr long PIECE = 4096; // numbers that a thread takes at once

// Calls run(i, All) or run(i, Some) for the vectors of n adjacent numbers
template <class Run> INLINE void each_vector(long n, int threads, Run run) {
#pragma omp parallel for num_threads(threads)
  for (long start = 0; start < n; start += PIECE)
    each_vector(std::min(PIECE, n - start), [&](long i, auto part) { run(start + i, part); });
}

// Muon's momentum M = decay * M + G, and its Nesterov update G + decay * M
static void nesterov(float *momentum, float *update, const float *gradient, float decay, long n, int threads) {
  each_vector(n, threads, [&](long i, auto part) {
    Vector g = get(gradient + i, part), m = get(momentum + i, part) * decay + g;
    put(momentum + i, m, part);
    put(update + i, g + m * decay, part);
  });
}

// A step with weight decay: W = kept * W + scale * direction
template <class T>
static void descend(float *weight, const T *direction, float kept, float scale, long n, int threads) {
  each_vector(n, threads, [&](long i, auto part) {
    put(weight + i, get(weight + i, part) * kept + get(direction + i, part) * scale, part);
  });
}
