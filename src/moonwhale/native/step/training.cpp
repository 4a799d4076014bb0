// The functions of training.h as Python calls them, a library of their own: it is compiled in two seconds.
//
// Each returns 0, or why nothing was computed: 1 if memory ran out, 2 if a label is no column, 3 if sizes contradict each
// other. `dtype` is that of all arrays but those declared float, and `step` the numbers from a row to the next.
#include <new>
#include <stdexcept>

#include "newton_schulz.h"
#include "rotation.h"
#include "routed.h"
#include "routing.h"
#include "training.h"

// The answer to the exception that was caught last
static int reason() try {
  throw;
} catch (const std::bad_alloc &) {
  return 1;
} catch (const std::length_error &) {
  return 3;
}

extern "C" {
int run_norm(void *y, float *inverse, const void *x, int64_t step, const float *weight, int64_t rows, int64_t columns,
             float eps, Dtype dtype, int64_t threads) try {
  if (!y || !inverse || !x || !weight || !is_valid_table(rows, columns, step, dtype, threads)) return 3;
  with_type(dtype, [&](auto *t) {
    rms_norm_forward((decltype(t))y, inverse, (decltype(t))x, step, weight, rows, columns, eps, threads);
  });
  return 0;
} catch (...) {
  return reason();
}

int run_norm_backward(void *d_x, float *d_weight, const void *d_y, int64_t d_step, const void *x, int64_t step,
                      const float *inverse, const float *weight, int64_t rows, int64_t columns, Dtype dtype,
                      int64_t threads) try {
  if (!d_x || !d_weight || !d_y || !x || !inverse || !weight) return 3;
  if (!is_valid_table(rows, columns, step, dtype, threads) || count({rows, d_step}) < 0) return 3;
  with_type(dtype, [&](auto *t) {
    using T = decltype(t);
    rms_norm_backward((T)d_x, d_weight, (T)d_y, d_step, (T)x, step, inverse, weight, rows, columns, threads);
  });
  return 0;
} catch (...) {
  return reason();
}

int run_score(void *logits, const int64_t *labels, float *total, float *nll, bool *correct, int64_t rows,
              int64_t columns, int64_t gradient, Dtype dtype, int64_t threads) try {
  if (!logits || !labels || !total || !nll || !correct) return 3;
  if (!is_valid_table(rows, columns, columns, dtype, threads)) return 3;
  if (!std::all_of(labels, labels + rows, [&](int64_t label) { return is_within(label, 0, columns - 1); })) return 2;
  with_type(dtype, [&](auto *t) {
    score_rows((decltype(t))logits, labels, total, nll, correct, rows, columns, gradient, threads);
  });
  return 0;
} catch (...) {
  return reason();
}

int run_gate(void *product, const void *gate, const void *up, int64_t step, const float *row_weight, int64_t rows,
             int64_t columns, Dtype dtype, int64_t threads) try {
  if (!product || !gate || !up || !is_valid_table(rows, columns, step, dtype, threads)) return 3;
  with_type(dtype, [&](auto *t) {
    using T = decltype(t);
    gate_forward((T)product, (T)gate, (T)up, step, row_weight, rows, columns, threads);
  });
  return 0;
} catch (...) {
  return reason();
}

int run_gate_backward(void *d_gate, void *d_up, int64_t d_step, float *d_weight, void *product, const void *d_product,
                      const void *gate, const void *up, int64_t step, const float *row_weight, int64_t rows,
                      int64_t columns, Dtype dtype, int64_t threads) try {
  if (!d_gate || !d_up || !d_product || !gate || !up || (row_weight && (!d_weight || !product))) return 3;
  if (!is_valid_table(rows, columns, step, dtype, threads) || d_step < columns || count({rows, d_step}) < 0) return 3;
  with_type(dtype, [&](auto *t) {
    using T = decltype(t);
    gate_backward((T)d_gate, (T)d_up, d_step, d_weight, (T)product, (T)d_product, (T)gate, (T)up, step, row_weight,
                  rows, columns, threads);
  });
  return 0;
} catch (...) {
  return reason();
}

// With `log_sum` it is an input and `peak` and `total` may be null; without, they are outputs.
int run_softmax(void *scores, float *peak, float *total, const float *log_sum, const int32_t *of_queries,
                const int32_t *of_keys, int64_t causal, int64_t heads, int64_t queries, int64_t keys, Dtype dtype,
                int64_t threads) try {
  if (!scores || (!log_sum && (!peak || !total)) || !of_queries != !of_keys) return 3;
  if (heads < 1 || queries < 1 || (causal && keys < queries)) return 3;
  if (!is_valid_table(count({heads, queries}), keys, keys, dtype, threads)) return 3;
  const Tile tile{heads, queries, keys, causal != 0, of_queries, of_keys};
  std::vector<float> scratch(log_sum ? 0 : count({threads, whole_vectors(keys)}));
  with_type(dtype, [&](auto *t) {
    if (log_sum) probability_rows((decltype(t))scores, log_sum, tile, threads);
    else softmax_rows((decltype(t))scores, peak, total, tile, scratch.data(), threads);
  });
  return 0;
} catch (...) {
  return reason();
}

int run_score_gradient(void *d_probs, const void *probs, const float *out_dot, float scale, int64_t rows,
                       int64_t columns, Dtype dtype, int64_t threads) try {
  if (!d_probs || !probs || !out_dot || !is_valid_table(rows, columns, columns, dtype, threads)) return 3;
  with_type(dtype, [&](auto *t) {
    using T = decltype(t);
    score_gradient_rows((T)d_probs, (T)probs, out_dot, scale, rows, columns, threads);
  });
  return 0;
} catch (...) {
  return reason();
}

int run_nesterov(float *momentum, float *update, const float *gradient, float decay, int64_t n, int64_t threads) try {
  if (!momentum || !update || !gradient || !is_valid_table(1, n, n, FP32, threads)) return 3;
  nesterov(momentum, update, gradient, decay, n, threads);
  return 0;
} catch (...) {
  return reason();
}

int run_descend(float *weight, const void *direction, float kept, float scale, int64_t n, Dtype dtype,
                int64_t threads) try {
  if (!weight || !direction || !is_valid_table(1, n, n, dtype, threads)) return 3;
  with_type(dtype, [&](auto *t) { descend(weight, (decltype(t))direction, kept, scale, n, threads); });
  return 0;
} catch (...) {
  return reason();
}

// `steps`: from a row, a head and a token of `from` to the next. With `backward`, `to` is the gradient of x, `from` that
// of the output.
int run_rotate(void *to, const void *from, const void *cos, const void *sin, const int64_t *steps, int64_t rows,
               int64_t heads, int64_t length, int64_t width, int64_t interleaved, int64_t backward, Dtype dtype,
               int64_t threads) try {
  if (!to || !from || !cos || !sin || !steps || heads < 1 || length < 1 || width % 2) return 3;
  if (!is_valid_table(count({rows, heads, length}), width, width, dtype, threads)) return 3;
  for (int i = 0; i < 3; i++) count({i == 0 ? rows : i == 1 ? heads : length, steps[i]});
  const Rotated rotated{rows, heads, length, width, steps[0], steps[1], steps[2], interleaved != 0};
  with_type(dtype, [&](auto *t) {
    using T = decltype(t);
    rotate((T)to, (T)from, (T)cos, (T)sin, rotated, backward != 0, threads);
  });
  return 0;
} catch (...) {
  return reason();
}

int run_route(float *scores, int64_t *index, float *gates, const void *x, int64_t step, const float *weight,
              const float *bias, const RouterSizes *sizes, Dtype dtype, int64_t threads) try {
  if (!scores || !index || !gates || !x || !weight || !bias || !sizes || !is_valid(*sizes)) return 3;
  if (!is_valid_table(sizes->tokens, sizes->hidden, step, dtype, threads)) return 3;
  std::vector<float> scratch(count({threads, sizes->hidden}));
  with_type(dtype, [&](auto *t) {
    route(scores, index, gates, (decltype(t))x, step, weight, bias, *sizes, scratch.data(), threads);
  });
  return 0;
} catch (...) {
  return reason();
}

// `d_scores` may be null.
int run_route_backward(void *d_x, float *d_weight, const float *d_scores, const float *d_gates, const float *scores,
                       const int64_t *index, const void *x, int64_t step, const float *weight,
                       const RouterSizes *sizes, Dtype dtype, int64_t threads) try {
  if (!d_x || !d_weight || !d_gates || !scores || !index || !x || !weight || !sizes || !is_valid(*sizes)) return 3;
  if (!is_valid_table(sizes->tokens, sizes->hidden, step, dtype, threads)) return 3;
  const auto inside = [&](int64_t e) { return is_within(e, 0, sizes->experts - 1); };
  if (!std::all_of(index, index + sizes->tokens * sizes->chosen, inside)) return 3;
  const Array<float> sums{CHUNKS, sizes->experts, sizes->hidden}, d_logits{sizes->tokens, sizes->experts};
  with_type(dtype, [&](auto *t) {
    using T = decltype(t);
    route_backward((T)d_x, d_weight, d_scores, d_gates, scores, index, (T)x, step, weight, *sizes, sums,
                   d_logits, threads);
  });
  return 0;
} catch (...) {
  return reason();
}

int run_balance(float *chosen_share, float *mean, const float *scores, const bool *valid, int64_t sequences,
                int64_t length, int64_t experts, int64_t chosen, int64_t threads) try {
  if (!chosen_share || !mean || !scores || !valid || !is_within(chosen, 1, experts)) return 3;
  if (!is_valid_table(count({sequences, length}), experts, experts, FP32, threads)) return 3;
  std::vector<int64_t> scratch(count({threads, chosen}));
  balance(chosen_share, mean, scores, valid, sequences, length, experts, chosen, scratch.data(), threads);
  return 0;
} catch (...) {
  return reason();
}

int run_balance_backward(float *d_scores, const float *d_mean, const float *scores, const bool *valid,
                         int64_t sequences, int64_t length, int64_t experts, int64_t threads) try {
  if (!d_scores || !d_mean || !scores || !valid) return 3;
  if (!is_valid_table(count({sequences, length}), experts, experts, FP32, threads)) return 3;
  balance_backward(d_scores, d_mean, scores, valid, sequences, length, experts, threads);
  return 0;
} catch (...) {
  return reason();
}

// `rows` is how many `item_of_row` has room for.
int run_line_up(int64_t *item_of_row, int64_t rows, int64_t *row_of_item, int64_t *ends, const int64_t *group,
                int64_t n, int64_t groups, int64_t multiple, int64_t row_multiple) try {
  if (!item_of_row || !row_of_item || !ends || !group) return 3;
  for (int64_t size : {rows, n, groups, multiple, row_multiple})
    if (!is_within(size, 1, MAX_NUMBERS)) return 3;
  if (rows < n + count({groups, multiple - 1}) + row_multiple - 1) return 3;
  if (!std::all_of(group, group + n, [&](int64_t g) { return is_within(g, 0, groups); })) return 3;
  line_up(item_of_row, row_of_item, ends, group, n, groups, multiple, row_multiple);
  return 0;
} catch (...) {
  return reason();
}

// Whether the functions that follow compute anything here
int has_units() { return may_use_units(); }

static bool is_valid_routed(const Routes &routes, std::initializer_list<const void *> arrays, int64_t threads) {
  if (!may_use_units() || !is_within(threads, 1, MAX_THREADS)) return false;
  return std::all_of(arrays.begin(), arrays.end(), [](const void *array) { return array; }) && is_valid(routes);
}

int run_routed(bf16 *out, bf16 *inner, const bf16 *x, const bf16 *gate_up, const bf16 *down, const Routes *routes,
               int64_t threads) try {
  if (!routes || !is_valid_routed(*routes, {out, inner, x, gate_up, down}, threads)) return 3;
  routed_forward(out, inner, x, gate_up, down, *routes, threads);
  return 0;
} catch (...) {
  return reason();
}

int run_routed_backward(bf16 *d_x, float *d_gate_up, float *d_down, float *d_weight, const bf16 *d_out, const bf16 *x,
                        const bf16 *inner, const bf16 *gate_up, const bf16 *down, const Routes *routes,
                        int64_t threads) try {
  if (!routes) return 3;
  if (!is_valid_routed(*routes, {d_x, d_gate_up, d_down, d_weight, d_out, x, inner, gate_up, down}, threads)) return 3;
  routed_backward({d_x, d_gate_up, d_down, d_weight}, d_out, x, inner, gate_up, down, *routes, threads);
  return 0;
} catch (...) {
  return reason();
}

int run_newton_schulz(bf16 *out, const float *matrices, int64_t n, int64_t rows, int64_t columns, int64_t steps,
                      int64_t threads) try {
  if (!out || !matrices || n < 1 || rows < 1 || columns < 1 || !is_within(steps, 0, MAX_NUMBERS)) return 3;
  if (!is_within(threads, 1, MAX_THREADS) || !may_use_units()) return 3;
  count({n, rows, columns});
  newton_schulz(out, matrices, {n, rows, columns}, steps, threads);
  return 0;
} catch (...) {
  return reason();
}
}
