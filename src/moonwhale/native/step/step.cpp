// One block of the model for a few new tokens: the computation of a DecoderBlock (infer/decoder.py) in one call.
//
// A step through PyTorch is hundreds of operations, and each takes longer to call than to compute. Here a block is a
// few loops over plain arrays, which native/build.py compiles for this machine. Intermediate values are floats,
// whatever the dtype of weights and cache. A token's result is the same to the last bit for any number of threads and
// for any other tokens in the batch.
//
// Functions called in a parallel region run on all threads of the team, and `omp for` divides a loop among them.
#include <new>
#include <stdexcept>
#include <vector>

#include "attention.h"
#include "checks.h"
#include "experts.h"

extern "C" {
// Runs a block on x (tokens, hidden) in place and writes the tokens' entries into the cache. `added` (tokens, rank), if
// not null, is added to the latents. Returns 0, or why nothing was computed: 1 if memory ran out, 2 if an entry would lie
// outside the cache, 3 if values contradict each other.
int run_block(const Block *b, const Cache *cache, const Placement *p, float *x, const float *added) try {
  if (!b || !cache || !p || !x || !is_valid(*b, *cache, *p)) return 3;
  if (!is_inside(*p, *cache)) return 2;
  const long tokens = p->rows * p->length;
  std::vector<float> h(tokens * b->hidden);
  Attention attention(b->attention, *cache, *p, added);
  FeedForward feed_forward(b->feed_forward, tokens);
#pragma omp parallel num_threads(p->threads)
  {
    rms_norm(h.data(), b->hidden, x, b->hidden, tokens, b->hidden, b->before);
    attention.run(x, h.data());
    rms_norm(h.data(), b->hidden, x, b->hidden, tokens, b->hidden, b->after);
    feed_forward.run(x, h.data());
  }
  return 0;
} catch (const std::bad_alloc &) {
  return 1;
} catch (const std::length_error &) { // more numbers than a vector can hold
  return 1;
}

// y (rows, out) = x (rows, in) @ m.T. Returns 0, or 3 as `run_block` does.
int run_product(const Matrix *m, float *y, const float *x, int64_t rows, int64_t threads) try {
  if (!rows) return 0; // such tensors have no address
  if (!m || !y || !x || rows < 0 || !is_within(threads, 1, MAX_THREADS) || !is_valid(*m, m->out, m->in)) return 3;
  count({rows, m->out}), count({rows, m->in});
#pragma omp parallel num_threads(threads)
  product(y, x, m->in, rows, *m);
  return 0;
} catch (const std::length_error &) {
  return 3;
}

// Bytes of each structure in the order of structures.h. A test compares them with the ctypes structures.
const int64_t *sizes() {
  static const int64_t bytes[] = {sizeof(Matrix),
                                  sizeof(Network),
                                  sizeof(Norm),
                                  sizeof(AttentionFields),
                                  sizeof(FeedForwardFields),
                                  sizeof(Block),
                                  sizeof(Cache),
                                  sizeof(Placement),
                                  sizeof(Routes),
                                  sizeof(RouterSizes)};
  return bytes;
}
}
