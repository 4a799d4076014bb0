// What native.py fills in, field by field the same there: addresses, sizes and settings. Sizes are as in mla.py and moe.py.
#pragma once
#include <cstdint>

enum Kind : int64_t { FP32, BF16, INT8 };

struct Matrix { // panels (ceil(out / 64), in, 64) of outputs, which are multiplied by `scale` where there is one
  const void *data;
  const float *scale, *bias; // (out) or null
  int64_t out, in;
  Kind kind;
};

struct Network {
  Matrix up, down; // gate and value (2 * inner, hidden), and back (hidden, inner)
};

struct Norm {
  const float *weight;
  float eps;
};

struct Block {
  int64_t hidden, heads, nope, rope, rank, v, interleaved, taps; // taps of the convolution on keys, or 0
  int64_t size, topk;                                            // of MoBA's blocks; topk 0 is full attention
  int64_t experts, chosen, groups, chosen_groups, sigmoid, normalise, shared; // experts 0 is a dense network
  float scale, factor;                                                        // of scores, of experts' gates
  Norm before, q_norm, kv_norm, after;
  Matrix down, q_up, up, out, router; // up is (heads * (nope + v), rank), no panels; q_up is empty without compression
  const float *conv, *bias;           // (taps, rank), the newest last; (experts) the balancer's
  const Network *networks;            // the experts, then the shared one; or the dense one
};

struct Cache { // a block's, as LatentCache has it
  void *keys, *values;
  float *means; // null without MoBA
  int64_t length;
  Kind kind;
};

struct Span { // where new tokens go, as decoder.Span has it
  int64_t rows, length, first, threads;
  const int64_t *start;
  const float *cos, *sin; // (positions, rope / 2)
};
