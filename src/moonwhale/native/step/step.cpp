// A block of the model for a few new tokens: decoder.py's blocks once more, in one call and at the speed of memory.
//
// A step through PyTorch is hundreds of operations that take longer to call than to compute; here it is loops over plain
// arrays, compiled by native.py. Numbers are floats in between, whatever weights and cache hold. A token's result is the
// same to the last bit whatever the number of threads, and whatever else is in the batch.
//
// What is called inside of a parallel region is run by its whole team, among which `omp for` shares out the rounds.
#include <vector>

#include "attention.h"
#include "experts.h"

extern "C" {
// Runs a block on x (tokens, hidden) in place; the tokens' entries go into the cache
void run_block(const Block *b, const Cache *cache, const Span *s, float *x) {
  const long tokens = s->rows * s->length;
  std::vector<float> h(tokens * b->hidden);
  Attention attention(*b, *cache, *s);
  FeedForward feed_forward(*b, tokens);
#pragma omp parallel num_threads(s->threads)
  {
    rms_norm(h.data(), b->hidden, x, b->hidden, tokens, b->hidden, b->before);
    attention.run(x, h.data());
    rms_norm(h.data(), b->hidden, x, b->hidden, tokens, b->hidden, b->after);
    feed_forward.run(x, h.data());
  }
}

// y (rows, out) = x (rows, in) @ m.T
void run_product(const Matrix *m, float *y, const float *x, int64_t rows, int64_t threads) {
#pragma omp parallel num_threads(threads)
  product(y, x, m->in, rows, *m);
}

// Bytes of each structure, which native.py's have to be as large as
const int64_t *sizes() {
  static const int64_t bytes[] = {sizeof(Matrix), sizeof(Network), sizeof(Norm),
                                  sizeof(Block),  sizeof(Cache),   sizeof(Span)};
  return bytes;
}
}
