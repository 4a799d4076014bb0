// Checks of what Python passes: values with which a step would leave its arrays are refused before anything is read.
//
// The lengths of the arrays behind pointers are the caller's to know. Everything else that a step relies on is here.
#pragma once
#include <algorithm>
#include <initializer_list>
#include <stdexcept>

#include "structures.h"

constexpr int64_t MAX_NUMBERS = int64_t(1) << 36; // of one array: more is a mistake, or does not fit into memory
constexpr int64_t MAX_THREADS = 4096;

// Returns the product of sizes. Throws if it is negative or too large for an array.
static int64_t count(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (int64_t size : sizes)
    if (size < 0 || __builtin_mul_overflow(product, size, &product) || product > MAX_NUMBERS)
      throw std::length_error("too many numbers");
  return product;
}

static bool is_within(int64_t x, int64_t low, int64_t high) { return low <= x && x <= high; }

static bool is_valid(const Matrix &m, int64_t out, int64_t in) {
  return m.data && m.out == out && m.in == in && is_within(m.dtype, FP32, INT8) && count({out, in}) > 0;
}

static bool is_valid(const Network &n, int64_t hidden, int64_t inner) {
  return is_valid(n.up, count({2, inner}), hidden) && is_valid(n.down, hidden, inner);
}

static bool is_valid(const AttentionFields &w, int64_t hidden) {
  for (int64_t size : {w.nope, w.rope, w.rank, w.v}) count({size}); // so that sums of them do not overflow
  const int64_t q = count({w.heads, w.nope + w.rope}), compressed = w.q_up.in, entry = w.rank + w.rope;
  if (q < 1 || w.rank < 1 || w.v < 1 || w.rope % 2 || w.block_size < 1 || w.topk < 0) return false;
  if (compressed && !(is_valid(w.q_up, q, count({compressed})) && w.q_norm.weight)) return false;
  if (w.taps < 0 || (w.taps && !w.conv)) return false;
  return w.kv_norm.weight && is_valid(w.down, (compressed ? compressed : q) + entry, hidden) &&
         is_valid(w.up, count({w.heads, w.nope + w.v}), w.rank) && is_valid(w.out, hidden, count({w.heads, w.v}));
}

static bool is_valid(const FeedForwardFields &w, int64_t hidden) {
  if (!w.networks || w.experts < 0) return false;
  if (!w.experts) return is_valid(w.networks[0], hidden, w.networks[0].down.in);
  if (!w.bias || !is_valid(w.router, w.experts, hidden) || !is_within(w.groups, 1, w.experts)) return false;
  if (w.experts % w.groups || !is_within(w.chosen_groups, 1, w.groups)) return false;
  if (!is_within(w.chosen, 1, w.experts / w.groups * w.chosen_groups)) return false;
  for (int64_t e = 0; e < w.experts; e++)
    if (!is_valid(w.networks[e], hidden, w.networks[0].down.in)) return false;
  return !w.shared || is_valid(w.networks[w.experts], hidden, w.networks[w.experts].down.in);
}

static bool is_valid(const Block &b, const Cache &cache, const Placement &p) {
  if (!b.before.weight || !b.after.weight || !is_valid(b.attention, b.hidden) || !is_valid(b.feed_forward, b.hidden))
    return false;
  if (!cache.keys || !cache.values || !is_within(cache.dtype, FP32, BF16)) return false;
  if (b.attention.topk && !cache.means) return false;
  if (cache.means && cache.blocks != cache.length / b.attention.block_size) return false;
  return p.start && p.cos && p.sin && is_within(p.threads, 1, MAX_THREADS);
}

// Returns whether new tokens have entries in the cache, and their positions have cosines and sines. It reads `start`.
static bool is_inside(const Placement &p, const Cache &cache) {
  const int64_t length = std::min(cache.length, p.positions);
  if (!is_within(p.rows, 1, cache.slots) || !is_within(p.first_slot, 0, cache.slots - p.rows)) return false;
  if (!is_within(p.length, 1, length)) return false;
  return std::all_of(p.start, p.start + p.rows, [&](int64_t n) { return is_within(n, 0, length - p.length); });
}
