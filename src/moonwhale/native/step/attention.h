// Absorbed latent attention of a few new tokens over a LatentCache: the same computation as DecoderAttention
// (infer/decoder.py).
#pragma once
#include <vector>

#include "checks.h"
#include "products.h"

extern "C" int omp_get_thread_num(); // torch has loaded the library

constexpr long CHUNK = 128;   // keys of a piece of full attention
constexpr int HEAD_GROUP = 4; // heads that read a piece together

// Attention of ROWS heads' queries q (ROWS, width) over n keys. For each head it writes the largest score to `top`, the
// sum of exponentials relative to that score to `total`, and the sum of values weighted by them to `latent` (rank).
// Successive heads are `step` numbers apart in `top` and `total`, and `step * rank` in `latent`.
// `scores` is scratch space for ROWS times n numbers, rounded up to whole vectors.
template <int ROWS, class T>
static void attend(const AttentionFields &w, const float *q, const T *keys, const T *values, long values_step, long n,
                   float *top, float *total, float *latent, long step, float *scores) {
  const long width = w.rank + w.rope, room = whole_vectors(n);
  std::fill_n(scores, ROWS * room, -1e30f); // padding of the last vector has weight 0
  dots<ROWS>(q, width, keys, width, n, width,
             [&](long k, long r, float score) { scores[r * room + k] = score * w.scale; });
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
  mix<ROWS>(latent, step * w.rank, scores, room, values, values_step, n, w.rank);
}

// Rotates pairs of x (rope) and writes them as two halves, as model/rope.py does
static void rotate(const AttentionFields &w, const Placement &p, const float *x, long position, float *y) {
  const long half = w.rope / 2, step = w.interleaved ? 2 : 1, apart = w.interleaved ? 1 : half;
  const float *cos = p.cos + position * half, *sin = p.sin + position * half;
  for (long i = 0; i < half; i++) {
    float a = x[step * i], c = x[step * i + apart];
    y[i] = a * cos[i] - c * sin[i];
    y[half + i] = c * cos[i] + a * sin[i];
  }
}

struct Attention {
  const AttentionFields &w;
  const Cache &cache;
  const Placement &p;
  const float *added; // (tokens, rank) to the latents, or null
  const long tokens = p.rows * p.length, width = w.rank + w.rope;
  const long compressed = w.q_up.in; // 0 if queries are not compressed
  const long last = *std::max_element(p.start, p.start + p.rows) + p.length - 1; // the last position
  const long blocks = last / w.block_size + 1, topk = std::min<long>(w.topk, blocks); // no sequence has more
  const long dense = topk ? std::min(last, topk * w.block_size - 1) : last; // the last position that reads all keys
  const long pieces = std::max(topk, dense / CHUNK + 1);                    // of a token's keys, at most
  const long longest = std::max<long>(CHUNK, topk ? std::min<long>(w.block_size, last + 1) : 0); // piece, at most
  const long scratch_step = std::max({HEAD_GROUP * whole_vectors(longest), long(w.rope), pieces + long(w.rank), last + 1});
  std::vector<float> projected, compressed_q, q, queries, top, total, latents, out;
  std::vector<long> chosen; // (tokens, heads, topk) blocks
  std::vector<float> scratch; // (threads, scratch_step), since nothing may be allocated in a parallel region
  std::vector<long> earlier;  // (threads, blocks)

  Attention(const AttentionFields &w, const Cache &cache, const Placement &p, const float *added)
      : w(w), cache(cache), p(p), added(added), projected(count({tokens, w.down.out})),
        compressed_q(count({tokens, compressed})), q(count({tokens, w.heads, w.nope + w.rope})),
        queries(count({tokens, w.heads, width})), top(count({tokens, w.heads, pieces})), total(top.size()),
        latents(count({tokens, w.heads, pieces, w.rank})), out(count({tokens, w.heads, w.v})),
        chosen(count({tokens, w.heads, topk})), scratch(count({p.threads, scratch_step})),
        earlier(topk ? count({p.threads, blocks}) : 0) {}

  float *own_scratch() { return &scratch[omp_get_thread_num() * scratch_step]; }
  long position(long token) const { return p.start[token / p.length] + token % p.length; }
  long slot(long token) const { return p.first_slot + token / p.length; }
  long entry(long token) const { return slot(token) * cache.length + position(token); }
  float *latent(long token) { return &projected[(token + 1) * w.down.out - width]; } // followed by its rotary key
  bool chooses(long token) const { return topk && position(token) / w.block_size >= topk; }

  // Adds the attention's output for h, the normed x, to x (tokens, hidden)
  void run(float *x, const float *h) {
    product(projected.data(), h, w.down.in, tokens, w.down);
    if (compressed) {
      rms_norm(compressed_q.data(), compressed, projected.data(), w.down.out, tokens, compressed, w.q_norm);
      product(q.data(), compressed_q.data(), compressed, tokens, w.q_up);
    } else {
#pragma omp for
      for (long t = 0; t < tokens; t++)
        std::copy_n(&projected[t * w.down.out], w.heads * (w.nope + w.rope), &q[t * w.heads * (w.nope + w.rope)]);
    }
    typed(cache.dtype, cache.keys, [&](auto *keys) {
      auto *values = (decltype(keys))cache.values;
      write_entries(keys, values);
      absorb();
      if (topk) choose();
      attend_pieces(keys, values);
    });
    expand();
    product(x, out.data(), w.out.in, tokens, w.out, true);
  }

  // Norms the latents, adds what is `added` to them, rotates the rotary keys, and writes both into the cache
  template <class T> void write_entries(T *keys, T *values) {
#pragma omp for
    for (long t = 0; t < tokens; t++) {
      float *c = latent(t), inverse = inverse_rms(c, w.rank, w.kv_norm.eps);
      float *rotated = own_scratch();
      rotate(w, p, c + w.rank, position(t), rotated);
      for (long i = 0; i < w.rank; i++) {
        c[i] *= inverse * w.kv_norm.weight[i];
        if (added) c[i] += added[t * w.rank + i];
        store(w.taps ? &values[entry(t) * w.rank + i] : &keys[entry(t) * width + i], c[i]);
      }
      for (long i = 0; i < w.rope; i++) store(&keys[entry(t) * width + w.rank + i], rotated[i]);
    }
    if (w.taps) convolve(keys, values);
    if (cache.means) average(keys);
  }

  // Writes the keys `c + silu(causal depthwise convolution of c)` (arXiv 2511.11571). The latents c are the values.
  template <class T> void convolve(T *keys, const T *values) {
#pragma omp for
    for (long t = 0; t < tokens; t++) {
      const long taps = std::min<long>(w.taps, position(t) + 1);
      for (long i = 0; i < w.rank; i++) {
        float mixed = 0;
        for (long back = 0; back < taps; back++)
          mixed += number(values[(entry(t) - back) * w.rank + i]) * w.conv[(w.taps - 1 - back) * w.rank + i];
        store(&keys[entry(t) * width + i], latent(t)[i] + mixed * sigmoid(mixed));
      }
    }
  }

  // Writes the mean entry of each block whose last token is among the new ones
  template <class T> void average(const T *keys) {
#pragma omp for
    for (long t = 0; t < tokens; t++) {
      if ((position(t) + 1) % w.block_size) continue;
      long block = position(t) / w.block_size;
      const T *entries = keys + (slot(t) * cache.length + block * w.block_size) * width;
      float *mean = cache.means + (slot(t) * (cache.length / w.block_size) + block) * width;
      std::fill_n(mean, width, 0);
      for (long k = 0; k < w.block_size; k++)
        for (long i = 0; i < width; i++) mean[i] += number(entries[k * width + i]) / w.block_size;
    }
  }

  // Writes queries (tokens, heads, width) for latents: W_UK is applied to the content part
  void absorb() {
#pragma omp for collapse(2)
    for (long t = 0; t < tokens; t++)
      for (long h = 0; h < w.heads; h++) {
        const float *from = &q[(t * w.heads + h) * (w.nope + w.rope)];
        float *to = &queries[(t * w.heads + h) * width];
        typed(w.up.dtype, w.up.data, [&](auto *up) {
          mix<1>(to, 0, from, 0, up + h * (w.nope + w.v) * w.rank, w.rank, w.nope, w.rank);
        });
        rotate(w, p, from + w.nope, position(t), to + w.rank);
      }
  }

  // MoBA: chooses a token's own block and the topk - 1 earlier blocks with the best gates
  void choose() {
#pragma omp for collapse(2)
    for (long t = 0; t < tokens; t++)
      for (long h = 0; h < w.heads; h++) {
        if (!chooses(t)) continue;
        const long own = position(t) / w.block_size;
        float *gates = own_scratch();
        long *order = &earlier[omp_get_thread_num() * blocks];
        for (long i = 0; i < own; i++) order[i] = i;
        const float *means = cache.means + slot(t) * (cache.length / w.block_size) * width;
        dots<1>(&queries[(t * w.heads + h) * width], 0, means, width, own, width,
                [&](long block, long, float gate) { gates[block] = gate; });
        std::partial_sort(order, order + topk - 1, order + own, [&](long i, long j) {
          return gates[i] > gates[j] || (gates[i] == gates[j] && i < j);
        });
        long *best = &chosen[(t * w.heads + h) * topk];
        std::copy_n(order, topk - 1, best);
        best[topk - 1] = own;
      }
  }

  // Attends to each piece of keys separately: a chosen block, or CHUNK keys in full attention
  template <class T> void attend_pieces(const T *keys, const T *values) {
    const long values_step = w.taps ? w.rank : width, groups = (w.heads + HEAD_GROUP - 1) / HEAD_GROUP;
    const long share = topk ? 1 : groups; // a thread that has read a piece has it in cache for the next heads
#pragma omp for collapse(3) schedule(dynamic, share)
    for (long t = 0; t < tokens; t++)
      for (long k = 0; k < pieces; k++)
        for (long group = 0; group < groups; group++) {
          const long slot_start = slot(t) * cache.length, head = group * HEAD_GROUP;
          const long heads = std::min<long>(HEAD_GROUP, w.heads - head);
          auto attend_heads = [&](auto rows, long h, long from, long n) {
            long entry = slot_start + from, place = (t * w.heads + h) * pieces + k;
            attend<decltype(rows)::value>(w, &queries[(t * w.heads + h) * width], keys + entry * width,
                                          values + entry * values_step, values_step, n, &top[place], &total[place],
                                          &latents[place * w.rank], pieces, own_scratch());
          };
          if (chooses(t)) {
            for (long h = head; h < head + heads && k < topk; h++) {
              long from = chosen[(t * w.heads + h) * topk + k] * w.block_size;
              long n = std::min<long>(w.block_size, position(t) + 1 - from);
              attend_heads(std::integral_constant<int, 1>(), h, from, n);
            }
          } else if (long from = k * CHUNK; from <= position(t)) {
            long n = std::min(CHUNK, position(t) + 1 - from);
            if (heads == HEAD_GROUP) attend_heads(std::integral_constant<int, HEAD_GROUP>(), head, from, n);
            else
              for (long h = head; h < head + heads; h++) attend_heads(std::integral_constant<int, 1>(), h, from, n);
          }
        }
  }

  // Merges the pieces of each head and applies W_UV
  void expand() {
#pragma omp for collapse(2)
    for (long t = 0; t < tokens; t++)
      for (long h = 0; h < w.heads; h++) {
        const long place = (t * w.heads + h) * pieces, n = chooses(t) ? topk : position(t) / CHUNK + 1;
        const float largest = *std::max_element(&top[place], &top[place] + n);
        float sum = 0, *weights = own_scratch(), *latent = weights + n;
        for (long k = 0; k < n; k++) sum += (weights[k] = std::exp(top[place + k] - largest)) * total[place + k];
        for (long k = 0; k < n; k++) weights[k] /= sum;
        mix<1>(latent, 0, weights, 0, &latents[place * w.rank], w.rank, n, w.rank);
        typed(w.up.dtype, w.up.data, [&](auto *up) {
          dots<1>(latent, 0, up + (h * (w.nope + w.v) + w.nope) * w.rank, w.rank, w.v, w.rank,
                  [&](long o, long, float y) { out[(t * w.heads + h) * w.v + o] = y; });
        });
      }
  }
};

