// Latent attention of a few new tokens over a LatentCache, absorbed: what decoder.py's _Attention does.
#pragma once
#include <vector>

#include "products.h"

constexpr long CHUNK = 128;  // keys of a piece of full attention
constexpr int TOGETHER = 4; // heads that look at it side by side

// What ROWS heads' queries q (width) make of n keys: each head's largest score, the sum of exponentials beside it, and
// the values' sum weighted by them. Heads are `step` apart there, and latents that many ranks.
template <int ROWS, class T>
static void attend(const Block &b, const float *q, const T *keys, const T *values, long values_step, long n, float *top,
                   float *total, float *latent, long step) {
  const long width = b.rank + b.rope, room = (n + LANES - 1) / LANES * LANES;
  std::vector<float> scores(ROWS * room, -1e30f); // what fills up the last vector weighs nothing
  dots<ROWS>(q, width, keys, width, n, width,
             [&](long k, long r, float score) { scores[r * room + k] = score * b.scale; });
  for (int r = 0; r < ROWS; r++) {
    float *row = &scores[r * room], largest = *std::max_element(row, row + n);
    Vector all = {};
    for (long k = 0; k < room; k += LANES) {
      Vector weight = exponential(load(row + k) - largest);
      all += weight;
      std::memcpy(row + k, &weight, sizeof weight);
    }
    top[r * step] = largest;
    total[r * step] = sum(all);
  }
  mix<ROWS>(latent, step * b.rank, scores.data(), room, values, values_step, n, b.rank);
}

// Writes pairs rotated as halves, as rope.py does
static void rotate(const Block &b, const Span &s, const float *x, long position, float *y) {
  const long half = b.rope / 2, step = b.interleaved ? 2 : 1, apart = b.interleaved ? 1 : half;
  const float *cos = s.cos + position * half, *sin = s.sin + position * half;
  for (long i = 0; i < half; i++) {
    float a = x[step * i], c = x[step * i + apart];
    y[i] = a * cos[i] - c * sin[i];
    y[half + i] = c * cos[i] + a * sin[i];
  }
}

struct Attention {
  const Block &b;
  const Cache &cache;
  const Span &s;
  const long tokens = s.rows * s.length, width = b.rank + b.rope, compressed = b.q_up.in;
  const long last = *std::max_element(s.start, s.start + s.rows) + s.length - 1; // position
  const long pieces = std::max(b.topk, last / CHUNK + 1);                        // of a token's keys, at most
  std::vector<float> first, compressed_q, q, queries, top, total, latents, out;
  std::vector<long> chosen; // (tokens, heads, topk) blocks

  Attention(const Block &b, const Cache &cache, const Span &s)
      : b(b), cache(cache), s(s), first(tokens * b.down.out), compressed_q(tokens * compressed),
        q(tokens * b.heads * (b.nope + b.rope)), queries(tokens * b.heads * width), top(tokens * b.heads * pieces),
        total(top.size()), latents(top.size() * b.rank), out(tokens * b.heads * b.v),
        chosen(tokens * b.heads * b.topk) {}

  long position(long token) const { return s.start[token / s.length] + token % s.length; }
  long slot(long token) const { return s.first + token / s.length; }
  long entry(long token) const { return slot(token) * cache.length + position(token); }
  float *latent(long token) { return &first[(token + 1) * b.down.out - width]; } // and its rotary key
  bool chooses(long token) const { return b.topk && position(token) / b.size >= b.topk; }

  // Adds to x (tokens, hidden) what attention makes of h, x normed
  void run(float *x, const float *h) {
    product(first.data(), h, b.hidden, tokens, b.down);
    if (compressed) {
      rms_norm(compressed_q.data(), compressed, first.data(), b.down.out, tokens, compressed, b.q_norm);
      product(q.data(), compressed_q.data(), compressed, tokens, b.q_up);
    } else {
#pragma omp for
      for (long t = 0; t < tokens; t++)
        std::copy_n(&first[t * b.down.out], b.heads * (b.nope + b.rope), &q[t * b.heads * (b.nope + b.rope)]);
    }
    typed(cache.kind, cache.keys, [&](auto *keys) {
      auto *values = (decltype(keys))cache.values;
      remember(keys, values);
      absorb();
      if (b.topk) choose();
      look(keys, values);
    });
    expand();
    product(x, out.data(), b.out.in, tokens, b.out, true);
  }

  template <class T> void remember(T *keys, T *values) {
#pragma omp for
    for (long t = 0; t < tokens; t++) {
      float *c = latent(t), inverse = inverse_rms(c, b.rank, b.kv_norm.eps);
      std::vector<float> rotated(b.rope);
      rotate(b, s, c + b.rank, position(t), rotated.data());
      for (long i = 0; i < b.rank; i++) {
        c[i] *= inverse * b.kv_norm.weight[i];
        store(b.taps ? &values[entry(t) * b.rank + i] : &keys[entry(t) * width + i], c[i]);
      }
      for (long i = 0; i < b.rope; i++) store(&keys[entry(t) * width + b.rank + i], rotated[i]);
    }
    if (b.taps) convolve(keys, values);
    if (cache.means) average(keys);
  }

  // Keys of `c + silu(causal depthwise convolution of c)` (arXiv 2511.11571) for latents c, the values
  template <class T> void convolve(T *keys, const T *values) {
#pragma omp for
    for (long t = 0; t < tokens; t++) {
      const long taps = std::min<long>(b.taps, position(t) + 1);
      for (long i = 0; i < b.rank; i++) {
        float mixed = 0;
        for (long back = 0; back < taps; back++)
          mixed += number(values[(entry(t) - back) * b.rank + i]) * b.conv[(b.taps - 1 - back) * b.rank + i];
        store(&keys[entry(t) * width + i], latent(t)[i] + mixed * sigmoid(mixed));
      }
    }
  }

  // The mean entry of each block whose last token is among these
  template <class T> void average(const T *keys) {
#pragma omp for
    for (long t = 0; t < tokens; t++) {
      if ((position(t) + 1) % b.size) continue;
      long block = position(t) / b.size;
      const T *entries = keys + (slot(t) * cache.length + block * b.size) * width;
      float *mean = cache.means + (slot(t) * (cache.length / b.size) + block) * width;
      std::fill_n(mean, width, 0);
      for (long k = 0; k < b.size; k++)
        for (long i = 0; i < width; i++) mean[i] += number(entries[k * width + i]) / b.size;
    }
  }

  // Queries (tokens, heads, width) of latents: W_UK applied to the content part
  void absorb() {
#pragma omp for collapse(2)
    for (long t = 0; t < tokens; t++)
      for (long h = 0; h < b.heads; h++) {
        const float *from = &q[(t * b.heads + h) * (b.nope + b.rope)];
        float *to = &queries[(t * b.heads + h) * width];
        typed(b.up.kind, b.up.data, [&](auto *w) {
          mix<1>(to, 0, from, 0, w + h * (b.nope + b.v) * b.rank, b.rank, b.nope, b.rank);
        });
        rotate(b, s, from + b.nope, position(t), to + b.rank);
      }
  }

  // MoBA: a token's own block, and of the earlier ones those with the best gates
  void choose() {
#pragma omp for collapse(2)
    for (long t = 0; t < tokens; t++)
      for (long h = 0; h < b.heads; h++) {
        if (!chooses(t)) continue;
        const long own = position(t) / b.size;
        std::vector<float> gates(own);
        std::vector<long> blocks(own);
        for (long i = 0; i < own; i++) blocks[i] = i;
        dots<1>(&queries[(t * b.heads + h) * width], 0, cache.means + slot(t) * (cache.length / b.size) * width, width,
                own, width, [&](long block, long, float gate) { gates[block] = gate; });
        std::partial_sort(blocks.begin(), blocks.begin() + b.topk - 1, blocks.end(), [&](long i, long j) {
          return gates[i] > gates[j] || (gates[i] == gates[j] && i < j);
        });
        long *best = &chosen[(t * b.heads + h) * b.topk];
        std::copy_n(blocks.begin(), b.topk - 1, best);
        best[b.topk - 1] = own;
      }
  }

  // Attention over each piece of keys by itself
  template <class T> void look(const T *keys, const T *values) {
    const long values_step = b.taps ? b.rank : width, groups = (b.heads + TOGETHER - 1) / TOGETHER;
    const long together = b.topk ? 1 : groups; // who has read a piece finds it in the cache for the next heads
#pragma omp for collapse(3) schedule(dynamic, together)
    for (long t = 0; t < tokens; t++)
      for (long k = 0; k < pieces; k++)
        for (long group = 0; group < groups; group++) {
          const long slot_start = slot(t) * cache.length, head = group * TOGETHER;
          const long heads = std::min<long>(TOGETHER, b.heads - head);
          auto some = [&](auto rows, long h, long from, long n) {
            long entry = slot_start + from, place = (t * b.heads + h) * pieces + k;
            attend<decltype(rows)::value>(b, &queries[(t * b.heads + h) * width], keys + entry * width,
                                          values + entry * values_step, values_step, n, &top[place], &total[place],
                                          &latents[place * b.rank], pieces);
          };
          if (chooses(t)) {
            for (long h = head; h < head + heads && k < b.topk; h++) {
              long from = chosen[(t * b.heads + h) * b.topk + k] * b.size;
              some(std::integral_constant<int, 1>(), h, from, std::min<long>(b.size, position(t) + 1 - from));
            }
          } else if (long from = k * CHUNK; from <= position(t)) {
            long n = std::min(CHUNK, position(t) + 1 - from);
            if (heads == TOGETHER) some(std::integral_constant<int, TOGETHER>(), head, from, n);
            else
              for (long h = head; h < head + heads; h++) some(std::integral_constant<int, 1>(), h, from, n);
          }
        }
  }

  // Pieces put together, and W_UV applied
  void expand() {
#pragma omp for collapse(2)
    for (long t = 0; t < tokens; t++)
      for (long h = 0; h < b.heads; h++) {
        const long place = (t * b.heads + h) * pieces, n = chooses(t) ? b.topk : position(t) / CHUNK + 1;
        const float largest = *std::max_element(&top[place], &top[place] + n);
        float sum = 0;
        std::vector<float> weights(n), latent(b.rank);
        for (long k = 0; k < n; k++) sum += (weights[k] = std::exp(top[place + k] - largest)) * total[place + k];
        for (long k = 0; k < n; k++) weights[k] /= sum;
        mix<1>(latent.data(), 0, weights.data(), 0, &latents[place * b.rank], b.rank, n, b.rank);
        typed(b.up.kind, b.up.data, [&](auto *w) {
          dots<1>(latent.data(), 0, w + (h * (b.nope + b.v) + b.nope) * b.rank, b.rank, b.v, b.rank,
                  [&](long o, long, float y) { out[(t * b.heads + h) * b.v + o] = y; });
        });
      }
  }
};

