// The feed-forward half of a block: the router, its chosen experts and the shared one, or a dense network. The same
// computation as ExpertLayer and GatedNetwork (infer/feed_forward.py).
#pragma once
#include <functional>
#include <utility>
#include <vector>

#include "checks.h"
#include "products.h"

struct FeedForward {
  const FeedForwardFields &w;
  const long tokens, assigned = w.experts ? count({tokens, w.chosen}) : 0;
  const long width = w.networks->up.in, inner = w.networks->down.in;
  const long shared = w.experts ? (w.shared ? w.networks[w.experts].down.in : 0) : inner;
  std::vector<float> logits, gates, inputs, hidden, outputs, hidden_shared;
  std::vector<long> order; // (assigned) the row of each of a token's choices, where rows are sorted by expert
  std::vector<long> ends;  // (experts + 1) expert e has rows ends[e] to ends[e + 1]
  std::vector<long> busy;  // experts that have rows
  std::vector<long> choices, open; // what `route` works on: (assigned) experts, and those it chooses from
  std::vector<float> biased;
  std::vector<std::pair<float, long>> groups;

  FeedForward(const FeedForwardFields &w, long tokens)
      : w(w), tokens(tokens), logits(count({tokens, w.experts})), gates(assigned), inputs(count({assigned, width})),
        hidden(count({assigned, 2, inner})), outputs(count({assigned, width})),
        hidden_shared(count({tokens, 2, shared})), order(assigned), ends(w.experts + 1), choices(assigned),
        biased(w.experts), groups(w.experts ? w.groups : 0) {
    busy.reserve(w.experts); // nothing may be allocated in a parallel region
    open.reserve(w.experts);
  }

  // Adds the networks' output for h, the normed x, to x (tokens, hidden)
  void run(float *x, const float *h) {
    if (shared) {
      const Network &network = w.networks[w.experts];
      product(hidden_shared.data(), h, width, tokens, network.up);
      activate(hidden_shared.data(), tokens, shared);
      product(x, hidden_shared.data(), 2 * shared, tokens, network.down, true);
    }
    if (!w.experts) return;
    product(logits.data(), h, width, tokens, w.router);
#pragma omp single
    route();
#pragma omp for
    for (long a = 0; a < assigned; a++) std::copy_n(h + a / w.chosen * width, width, &inputs[order[a] * width]);
    each([&](const Network &n, long first, long rows, long panel) {
      panel_product(&hidden[first * 2 * inner], &inputs[first * width], width, rows, n.up, panel, false);
    }, panels(w.networks->up));
    activate(hidden.data(), assigned, inner);
    each([&](const Network &n, long first, long rows, long panel) {
      panel_product(&outputs[first * width], &hidden[first * 2 * inner], 2 * inner, rows, n.down, panel, false);
    }, panels(w.networks->down));
#pragma omp for
    for (long t = 0; t < tokens; t++)
      for (long k = t * w.chosen; k < (t + 1) * w.chosen; k++)
        for (long i = 0; i < width; i++) x[t * width + i] += gates[k] * outputs[order[k] * width + i];
  }

  // Runs every panel of every expert that has rows
  template <class Run> void each(Run run, long panels) {
    const long n = busy.size();
#pragma omp for collapse(2)
    for (long i = 0; i < n; i++)
      for (long panel = 0; panel < panels; panel++)
        run(w.networks[busy[i]], ends[busy[i]], ends[busy[i] + 1] - ends[busy[i]], panel);
  }

  // Replaces the gate (rows, inner) by silu(gate) * value
  void activate(float *h, long rows, long inner) {
#pragma omp for collapse(2)
    for (long r = 0; r < rows; r++)
      for (long i = 0; i < inner; i++) {
        float *gate = h + r * 2 * inner + i;
        *gate *= sigmoid(*gate) * gate[inner];
      }
  }

  // Chooses experts by the logits, as Router in model/moe.py does, and sorts the rows by expert
  void route() {
    for (long t = 0; t < tokens; t++) {
      float *scores = &logits[t * w.experts], all = 0;
      const float largest = *std::max_element(scores, scores + w.experts);
      for (long e = 0; e < w.experts; e++) {
        scores[e] = w.sigmoid ? sigmoid(scores[e]) : std::exp(scores[e] - largest);
        all += scores[e];
      }
      if (!w.sigmoid)
        for (long e = 0; e < w.experts; e++) scores[e] /= all;
      open_groups(scores);
      std::partial_sort(open.begin(), open.begin() + w.chosen, open.end(),
                        [&](long i, long j) { return scores[i] + w.bias[i] > scores[j] + w.bias[j]; });
      float total = 1e-20f;
      for (long k = 0; k < w.chosen; k++) total += scores[open[k]];
      for (long k = 0; k < w.chosen; k++) {
        choices[t * w.chosen + k] = open[k];
        gates[t * w.chosen + k] = scores[open[k]] * w.factor / (w.normalise ? total : 1);
      }
    }
    long next = 0;
    for (long e = 0; e < w.experts; e++) {
      ends[e] = next;
      for (long a = 0; a < assigned; a++)
        if (choices[a] == e) order[a] = next++;
      if (next > ends[e]) busy.push_back(e);
    }
    ends[w.experts] = next;
  }

  // Fills `open` with the experts of the `chosen_groups` groups whose two best experts score highest. Unlike std::sort,
  // std::partial_sort stays within its range if a score is NaN.
  void open_groups(const float *scores) {
    const long size = w.experts / w.groups;
    for (long g = 0; g < w.groups; g++) {
      for (long i = 0; i < size; i++) biased[i] = scores[g * size + i] + w.bias[g * size + i];
      std::partial_sort(&biased[0], &biased[0] + std::min(size, 2L), &biased[0] + size, std::greater<float>());
      groups[g] = {-(size > 1 ? biased[0] + biased[1] : biased[0]), g};
    }
    std::partial_sort(groups.begin(), groups.begin() + w.chosen_groups, groups.end());
    open.clear();
    for (long g = 0; g < w.chosen_groups; g++)
      for (long i = 0; i < size; i++) open.push_back(groups[g].second * size + i);
  }
};
