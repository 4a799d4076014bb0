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
#include "experts.h"

static bool fits(const Placement &p, const Cache &cache) {
  const int64_t *last = std::max_element(p.start, p.start + p.rows), *first = std::min_element(p.start, p.start + p.rows);
  return p.first_slot >= 0 && p.first_slot + p.rows <= cache.slots && *first >= 0 && *last + p.length <= cache.length;
}

extern "C" {
// Runs a block on x (tokens, hidden) in place and writes the tokens' entries into the cache. Returns 0, or why nothing
// was computed: 1 if memory ran out, 2 if an entry would lie outside the cache.
int run_block(const Block *b, const Cache *cache, const Placement *p, float *x) try {
  if (!fits(*p, *cache)) return 2;
  const long tokens = p->rows * p->length;
  std::vector<float> h(tokens * b->hidden);
  Attention attention(b->attention, *cache, *p);
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

// y (rows, out) = x (rows, in) @ m.T
void run_product(const Matrix *m, float *y, const float *x, int64_t rows, int64_t threads) {
#pragma omp parallel num_threads(threads)
  product(y, x, m->in, rows, *m);
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
                                  sizeof(Placement)};
  return bytes;
}
}
