// The functions of training.h as Python calls them, a library of their own: it is compiled in two seconds.
//
// Each returns 0, or why nothing was computed: 1 if memory ran out, 2 if a label is no column, 3 if sizes contradict each
// other. `dtype` is that of all arrays but those declared float, and `step` the numbers from a row to the next.
#include <new>
#include <stdexcept>

#include "training.h"

extern "C" {
int run_norm(void *y, float *inverse, const void *x, int64_t step, const float *weight, int64_t rows, int64_t columns,
             float eps, Dtype dtype, int64_t threads) try {
  if (!y || !inverse || !x || !weight || !is_valid_table(rows, columns, step, dtype, threads)) return 3;
  with_type(dtype, [&](auto *t) {
    rms_norm_forward((decltype(t))y, inverse, (decltype(t))x, step, weight, rows, columns, eps, threads);
  });
  return 0;
} catch (const std::length_error &) {
  return 3;
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
} catch (const std::bad_alloc &) {
  return 1;
} catch (const std::length_error &) {
  return 3;
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
} catch (const std::length_error &) {
  return 3;
}

int run_gate(void *product, const void *gate, const void *up, int64_t step, const float *row_weight, int64_t rows,
             int64_t columns, Dtype dtype, int64_t threads) try {
  if (!product || !gate || !up || !is_valid_table(rows, columns, step, dtype, threads)) return 3;
  with_type(dtype, [&](auto *t) {
    using T = decltype(t);
    gate_forward((T)product, (T)gate, (T)up, step, row_weight, rows, columns, threads);
  });
  return 0;
} catch (const std::length_error &) {
  return 3;
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
} catch (const std::length_error &) {
  return 3;
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
} catch (const std::bad_alloc &) {
  return 1;
} catch (const std::length_error &) {
  return 3;
}

int run_score_gradient(void *d_probs, const void *probs, const float *out_dot, float scale, int64_t rows,
                       int64_t columns, Dtype dtype, int64_t threads) try {
  if (!d_probs || !probs || !out_dot || !is_valid_table(rows, columns, columns, dtype, threads)) return 3;
  with_type(dtype, [&](auto *t) {
    using T = decltype(t);
    score_gradient_rows((T)d_probs, (T)probs, out_dot, scale, rows, columns, threads);
  });
  return 0;
} catch (const std::length_error &) {
  return 3;
}

int run_nesterov(float *momentum, float *update, const float *gradient, float decay, int64_t n, int64_t threads) try {
  if (!momentum || !update || !gradient || !is_valid_table(1, n, n, FP32, threads)) return 3;
  nesterov(momentum, update, gradient, decay, n, threads);
  return 0;
} catch (const std::length_error &) {
  return 3;
}

int run_descend(float *weight, const void *direction, float kept, float scale, int64_t n, Dtype dtype,
                int64_t threads) try {
  if (!weight || !direction || !is_valid_table(1, n, n, dtype, threads)) return 3;
  with_type(dtype, [&](auto *t) { descend(weight, (decltype(t))direction, kept, scale, n, threads); });
  return 0;
} catch (const std::length_error &) {
  return 3;
}
}
