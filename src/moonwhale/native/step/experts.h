// The feed-forward half of a block: router, the experts chosen and the shared ones, or a dense network. See experts.py.
#pragma once
#include <functional>
#include <utility>
#include <vector>

#include "products.h"

struct FeedForward {
  const Block &b;
  const long tokens, assigned = tokens * b.chosen, inner = b.networks->down.in;
  const long shared = b.experts ? (b.shared ? b.networks[b.experts].down.in : 0) : inner;
  std::vector<float> logits, gates, taken, hidden, given, hidden_shared;
  std::vector<long> order, ends, busy; // (assigned) rows of a token's choices; (experts + 1); experts that have rows

  FeedForward(const Block &b, long tokens)
      : b(b), tokens(tokens), logits(tokens * b.experts), gates(assigned), taken(assigned * b.hidden),
        hidden(assigned * 2 * inner), given(assigned * b.hidden), hidden_shared(tokens * 2 * shared), order(assigned),
        ends(b.experts + 1) {}

  // Adds to x (tokens, hidden) what the networks make of h, x normed
  void run(float *x, const float *h) {
    if (shared) {
      const Network &network = b.networks[b.experts];
      product(hidden_shared.data(), h, b.hidden, tokens, network.up);
      activate(hidden_shared.data(), tokens, shared);
      product(x, hidden_shared.data(), 2 * shared, tokens, network.down, true);
    }
    if (!b.experts) return;
    product(logits.data(), h, b.hidden, tokens, b.router);
#pragma omp single
    route();
#pragma omp for
    for (long a = 0; a < assigned; a++) std::copy_n(h + a / b.chosen * b.hidden, b.hidden, &taken[order[a] * b.hidden]);
    each([&](const Network &n, long first, long rows, long panel) {
      part_of_product(&hidden[first * 2 * inner], &taken[first * b.hidden], b.hidden, rows, n.up, panel, false);
    }, panels(b.networks->up));
    activate(hidden.data(), assigned, inner);
    each([&](const Network &n, long first, long rows, long panel) {
      part_of_product(&given[first * b.hidden], &hidden[first * 2 * inner], 2 * inner, rows, n.down, panel, false);
    }, panels(b.networks->down));
#pragma omp for
    for (long t = 0; t < tokens; t++)
      for (long k = t * b.chosen; k < (t + 1) * b.chosen; k++)
        for (long i = 0; i < b.hidden; i++) x[t * b.hidden + i] += gates[k] * given[order[k] * b.hidden + i];
  }

  // Runs every panel of every expert that has rows
  template <class Run> void each(Run run, long panels) {
    const long n = busy.size();
#pragma omp for collapse(2)
    for (long i = 0; i < n; i++)
      for (long panel = 0; panel < panels; panel++)
        run(b.networks[busy[i]], ends[busy[i]], ends[busy[i] + 1] - ends[busy[i]], panel);
  }

  // silu(gate) * value over the gate
  void activate(float *h, long rows, long inner) {
#pragma omp for collapse(2)
    for (long r = 0; r < rows; r++)
      for (long i = 0; i < inner; i++) {
        float *gate = h + r * 2 * inner + i;
        *gate *= sigmoid(*gate) * gate[inner];
      }
  }

  // From logits, as Router does: gates, and rows sorted by expert
  void route() {
    std::vector<long> experts(assigned), best;
    for (long t = 0; t < tokens; t++) {
      float *scores = &logits[t * b.experts], all = 0;
      const float largest = *std::max_element(scores, scores + b.experts);
      for (long e = 0; e < b.experts; e++) {
        scores[e] = b.sigmoid ? sigmoid(scores[e]) : std::exp(scores[e] - largest);
        all += scores[e];
      }
      if (!b.sigmoid)
        for (long e = 0; e < b.experts; e++) scores[e] /= all;
      best = open_groups(scores);
      std::partial_sort(best.begin(), best.begin() + b.chosen, best.end(),
                        [&](long i, long j) { return scores[i] + b.bias[i] > scores[j] + b.bias[j]; });
      float total = 1e-20f;
      for (long k = 0; k < b.chosen; k++) total += scores[best[k]];
      for (long k = 0; k < b.chosen; k++) {
        experts[t * b.chosen + k] = best[k];
        gates[t * b.chosen + k] = scores[best[k]] * b.factor / (b.normalise ? total : 1);
      }
    }
    long next = 0;
    for (long e = 0; e < b.experts; e++) {
      ends[e] = next;
      for (long a = 0; a < assigned; a++)
        if (experts[a] == e) order[a] = next++;
      if (next > ends[e]) busy.push_back(e);
    }
    ends[b.experts] = next;
  }

  // The experts of the groups whose two best score highest
  std::vector<long> open_groups(const float *scores) const {
    const long size = b.experts / b.groups;
    std::vector<std::pair<float, long>> groups;
    for (long g = 0; g < b.groups; g++) {
      std::vector<float> biased(size);
      for (long i = 0; i < size; i++) biased[i] = scores[g * size + i] + b.bias[g * size + i];
      std::sort(biased.begin(), biased.end(), std::greater<float>());
      groups.push_back({-(size > 1 ? biased[0] + biased[1] : biased[0]), g});
    }
    std::sort(groups.begin(), groups.end());
    std::vector<long> open;
    for (long g = 0; g < b.chosen_groups; g++)
      for (long i = 0; i < size; i++) open.push_back(groups[g].second * size + i);
    return open;
  }
};

