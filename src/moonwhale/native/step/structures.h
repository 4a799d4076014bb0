// The structures that Python fills and the compiled steps read.
//
// This file is the only declaration of their fields: native/structures.py reads it and makes a ctypes structure of each
// struct. Keep to declarations like `type a, b;` and `const type *a, *b;`.
//
// To add a field to the attention:
//   1. model/mla.py: let the model compute with it. If it is a setting, declare it in model/config_fields.py. If it is
//      a parameter, initialise it (model/pretrained.py, _init_weights), count it (costs.py), and let export/ refuse or
//      convert it.
//   2. infer/decoder.py, DecoderAttention.__init__: keep it as an attribute, and use it in the PyTorch path.
//   3. Here: declare it in AttentionFields under the name of that attribute. native/block.py fills fields by name.
//   4. attention.h: use it as `w.name`.
//   5. tests/infer/test_decoder.py: add a configuration that uses it to CONFIGS. It compares all of these.
//   6. checks.h: refuse values with which attention.h would leave its arrays.
// A field of the feed-forward half goes the same way: ExpertLayer.native_fields, FeedForwardFields, experts.h.
#pragma once
#include <cstdint>

enum Dtype : int64_t { FP32, BF16, INT8 }; // in the order of DTYPE_CODES in structures.py

// A weight in panels (ceil(out / 64), in, 64), or as it is (out, in) where its user says so.
struct Matrix {
  const void *data;
  const float *scale, *bias; // (out) each, or null
  int64_t out, in;
  Dtype dtype;
};

struct Network { // a gated feed-forward network
  Matrix up;     // gate and value (2 * inner, hidden)
  Matrix down;   // (hidden, inner)
};

struct Norm {
  const float *weight;
  float eps;
};

struct AttentionFields {
  int64_t heads, nope, rope, rank, v, interleaved; // sizes as in model/mla.py
  int64_t taps;                                    // width of the convolution on keys, or 0
  int64_t block_size, topk;                        // of MoBA; topk 0 is full attention
  float scale;                                     // of the scores
  Norm q_norm, kv_norm;
  Matrix down;       // to compressed (or whole) queries, latent and rotary key
  Matrix q_up;       // empty if queries are not compressed
  Matrix up;         // (heads * (nope + v), rank), not in panels
  Matrix out;        // (hidden, heads * v)
  const float *conv; // (taps, rank), the newest tap last
};

struct FeedForwardFields {
  int64_t experts; // 0 for a dense network
  int64_t chosen, groups, chosen_groups, sigmoid, normalise, shared;
  float factor;            // of the gates
  Matrix router;           // (experts, hidden)
  const float *bias;       // (experts), which balances the router's load
  const Network *networks; // the experts, then the shared one; or the dense one
};

struct Block {
  int64_t hidden;
  Norm before, after; // of the attention's input and of the feed-forward's
  AttentionFields attention;
  FeedForwardFields feed_forward;
};

struct Cache { // one block's tensors of a LatentCache
  void *keys, *values;
  float *means; // null without MoBA
  int64_t slots, length, blocks; // a slot's tokens, and its means
  Dtype dtype;
};

struct Placement { // where new tokens go in the cache, see infer/placement.py
  int64_t rows, length, first_slot, threads;
  int64_t positions;      // that `cos` and `sin` have
  const int64_t *start;   // (rows)
  const float *cos, *sin; // (positions, rope / 2)
};

struct Routes { // the rows of a training step's (token, expert) pairs, lined up by expert
  int64_t tokens, chosen, experts, rows, hidden, inner;
  const int64_t *token; // (rows)
  const int64_t *row;   // (tokens, chosen), of each pair
  const int32_t *ends;  // (experts), where the rows of each end
  const float *weight;  // (rows), of an expert's output; 0 for rows that only fill up
};

struct RouterSizes { // of a training step's router
  int64_t tokens, hidden, experts, chosen, sigmoid, normalise;
  float factor; // of the gates
};
