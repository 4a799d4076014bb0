// Choices of a training step: experts for each token (Router in model/moe.py), how evenly they are used, and rows lined
// up by group (model/groups.py). PyTorch needs thirty small operations for them.
#pragma once
#include "training.h"

static bool is_valid(const RouterSizes &s) {
  count({s.tokens, s.hidden});
  count({s.experts, s.hidden, CHUNKS});
  count({s.tokens, s.experts});
  return s.tokens > 0 && s.hidden > 0 && is_within(s.chosen, 1, s.experts);
}

// The K best of `scores` + `bias`, the best first, and the first of equals
static void choose(int64_t *index, const float *scores, const float *bias, long experts, long chosen) {
  for (long k = 0; k < chosen; k++) {
    long best = -1;
    for (long e = 0; e < experts; e++) {
      if (std::find(index, index + k, e) != index + k) continue;
      if (best < 0 || scores[e] + (bias ? bias[e] : 0) > scores[best] + (bias ? bias[best] : 0)) best = e;
    }
    index[k] = best;
  }
}

static void softmax(float *x, long n) {
  const float peak = *std::max_element(x, x + n);
  float total = 0;
  for (long i = 0; i < n; i++) total += x[i] = std::exp(x[i] - peak);
  for (long i = 0; i < n; i++) x[i] /= total;
}

// All in fp32: scores (tokens, experts), index and gates (tokens, chosen). `scratch` (threads, hidden)
template <class T>
static void route(float *scores, int64_t *index, float *gates, const T *x, long step, const float *weight,
                  const float *bias, const RouterSizes &s, float *scratch, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long t = 0; t < s.tokens; t++) {
    float *own = scores + t * s.experts, *in = scratch + omp_get_thread_num() * s.hidden, total = 0;
    each_vector(s.hidden, [&](long i, auto part) { put(in + i, get(x + t * step + i, part), part); });
    dots<1>(in, 0, weight, s.hidden, s.experts, s.hidden, [&](long e, int, float logit) { own[e] = logit; });
    if (s.sigmoid) each_vector(s.experts, [&](long e, auto part) { put(own + e, sigmoid(get(own + e, part)), part); });
    else softmax(own, s.experts);
    choose(index + t * s.chosen, own, bias, s.experts, s.chosen);
    for (long k = 0; k < s.chosen; k++) total += own[index[t * s.chosen + k]];
    const float scale = s.normalise ? s.factor / (total + 1e-20f) : s.factor;
    for (long k = 0; k < s.chosen; k++) gates[t * s.chosen + k] = own[index[t * s.chosen + k]] * scale;
  }
}

// d_logits (experts) of a token from those of its scores (null if there is none) and of its gates
static void d_route(float *d_logits, const float *d_scores, const float *d_gates, const float *scores,
                    const int64_t *index, const RouterSizes &s) {
  float total = 0, along = 0;
  for (long k = 0; k < s.chosen; k++) {
    total += scores[index[k]];
    along += d_gates[k] * scores[index[k]];
  }
  for (long e = 0; e < s.experts; e++) d_logits[e] = d_scores ? d_scores[e] : 0;
  for (long k = 0; k < s.chosen; k++) {
    const float d = s.normalise ? (d_gates[k] - along / (total + 1e-20f)) / (total + 1e-20f) : d_gates[k];
    d_logits[index[k]] += d * s.factor;
  }
  float mean = 0; // of softmax
  if (!s.sigmoid)
    for (long e = 0; e < s.experts; e++) mean += d_logits[e] * scores[e];
  for (long e = 0; e < s.experts; e++) d_logits[e] = (d_logits[e] - mean) * scores[e] * (s.sigmoid ? 1 - scores[e] : 1);
}

// d_x (tokens, hidden) and d_weight (experts, hidden). `sums` (CHUNKS, experts, hidden) and `d_logits` (tokens, experts)
template <class T>
static void route_backward(T *d_x, float *d_weight, const float *d_scores, const float *d_gates, const float *scores,
                           const int64_t *index, const T *x, long step, const float *weight, const RouterSizes &s,
                           float *sums, float *d_logits, int threads) {
  const long numbers = s.experts * s.hidden, chunks = std::min<long>(s.tokens, CHUNKS);
#pragma omp parallel for num_threads(threads)
  for (long chunk = 0; chunk < chunks; chunk++) {
    const long first = s.tokens * chunk / chunks, last = s.tokens * (chunk + 1) / chunks;
    for (long t = first; t < last; t++) {
      float *own = d_logits + t * s.experts;
      d_route(own, d_scores ? d_scores + t * s.experts : nullptr, d_gates + t * s.chosen, scores + t * s.experts,
              index + t * s.chosen, s);
      each_vector(s.hidden, [&](long i, auto part) {
        Vector total = {};
        for (long e = 0; e < s.experts; e++) total += get(weight + e * s.hidden + i, part) * own[e];
        put(d_x + t * s.hidden + i, total, part);
      });
    }
    for (long e = 0; e < s.experts; e++)
      each_vector(s.hidden, [&](long i, auto part) {
        Vector total = {};
        for (long t = first; t < last; t++) total += get(x + t * step + i, part) * d_logits[t * s.experts + e];
        put(sums + chunk * numbers + e * s.hidden + i, total, part);
      });
  }
#pragma omp parallel for num_threads(threads)
  for (long e = 0; e < s.experts; e++) {
    float *own = d_weight + e * s.hidden;
    std::fill_n(own, s.hidden, 0);
    for (long chunk = 0; chunk < chunks; chunk++)
      for (long i = 0; i < s.hidden; i++) own[i] += sums[chunk * numbers + e * s.hidden + i];
  }
}

// For each sequence and expert, over tokens that are `valid` (sequences, length): `chosen_share`, the share of choices
// without a bias times experts / chosen, and `mean`, the mean share of the scores, both (sequences, experts).
// `scratch` (threads, chosen)
static void balance(float *chosen_share, float *mean, const float *scores, const bool *valid, long sequences,
                    long length, long experts, long chosen, int64_t *scratch, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long s = 0; s < sequences; s++) {
    float *share = chosen_share + s * experts, *own = mean + s * experts;
    int64_t *index = scratch + omp_get_thread_num() * chosen;
    long tokens = 0;
    std::fill_n(share, experts, 0);
    std::fill_n(own, experts, 0);
    for (long t = s * length; t < (s + 1) * length; t++) {
      if (!valid[t]) continue;
      tokens++;
      const float *at = scores + t * experts;
      choose(index, at, nullptr, experts, chosen);
      for (long k = 0; k < chosen; k++) share[index[k]]++;
      float total = 1e-20f;
      for (long e = 0; e < experts; e++) total += at[e];
      for (long e = 0; e < experts; e++) own[e] += at[e] / total;
    }
    for (long e = 0; e < experts; e++) {
      share[e] *= float(experts) / (chosen * std::max(tokens, 1L));
      own[e] /= std::max(tokens, 1L);
    }
  }
}

// d_scores (tokens, experts) for d_mean (sequences, experts)
static void balance_backward(float *d_scores, const float *d_mean, const float *scores, const bool *valid,
                             long sequences, long length, long experts, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long s = 0; s < sequences; s++) {
    const float *d = d_mean + s * experts;
    const long tokens = std::max<long>(std::count(valid + s * length, valid + (s + 1) * length, true), 1);
    for (long t = s * length; t < (s + 1) * length; t++) {
      const float *at = scores + t * experts;
      float total = 1e-20f, along = 0;
      for (long e = 0; e < experts; e++) total += at[e];
      for (long e = 0; e < experts; e++) along += d[e] * at[e] / total;
      for (long e = 0; e < experts; e++) d_scores[t * experts + e] = valid[t] ? (d[e] - along) / (total * tokens) : 0;
    }
  }
}

// Sorts items by `group` (n) into rows, and pads each group's rows to a multiple of `multiple`, all rows to one of
// `row_multiple`. Items of group `groups` get no row.
static void line_up(int64_t *item_of_row, int64_t *row_of_item, int64_t *ends, const int64_t *group, long n,
                       long groups, long multiple, long row_multiple) {
  std::vector<int64_t> next(groups + 1);
  for (long i = 0; i < n; i++) next[group[i]]++;
  int64_t end = 0;
  for (long g = 0; g < groups; g++) {
    const int64_t size = next[g];
    next[g] = end;
    ends[g] = end += (size + multiple - 1) / multiple * multiple;
  }
  const int64_t rows = (end + row_multiple - 1) / row_multiple * row_multiple;
  std::fill_n(item_of_row, rows, -1);
  for (long i = 0; i < n; i++) {
    row_of_item[i] = group[i] == groups ? rows : next[group[i]]++;
    if (group[i] != groups) item_of_row[row_of_item[i]] = i;
  }
}
