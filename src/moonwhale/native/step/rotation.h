// The rotation of queries and keys by their positions, as `rotate` in model/rope.py computes it.
#pragma once
#include "training.h"

struct Rotated { // numbers (rows, heads, length, width), whose last axis is adjacent in `x`
  long rows, heads, length, width, row_step, head_step, step;
  bool interleaved;
  long place(long pair, bool second) const { // of a number of a pair in x; `out` has the two halves
    return interleaved ? 2 * pair + second : pair + (second ? width / 2 : 0);
  }
};

// out (rows, heads, length, width) from x, by cosines and sines (rows, length, width / 2)
template <class T>
static void rotate(T *out, const T *x, const T *cos, const T *sin, const Rotated &r, int threads) {
  const long half = r.width / 2;
#pragma omp parallel for num_threads(threads)
  for (long i = 0; i < r.rows * r.heads * r.length; i++) {
    const long t = i % r.length, head = i / r.length % r.heads, row = i / r.length / r.heads;
    const T *in = x + row * r.row_step + head * r.head_step + t * r.step;
    const T *c = cos + (row * r.length + t) * half, *s = sin + (row * r.length + t) * half;
    for (long pair = 0; pair < half; pair++) {
      const float a = number(in[r.place(pair, false)]), b = number(in[r.place(pair, true)]);
      store(out + i * r.width + pair, a * number(c[pair]) - b * number(s[pair]));
      store(out + i * r.width + half + pair, b * number(c[pair]) + a * number(s[pair]));
    }
  }
}

// The gradient (rows, heads, length, width) of x, from that of `out`
template <class T>
static void rotate_backward(T *d_x, const T *d_out, const T *cos, const T *sin, const Rotated &r, int threads) {
  const long half = r.width / 2;
#pragma omp parallel for num_threads(threads)
  for (long i = 0; i < r.rows * r.heads * r.length; i++) {
    const long t = i % r.length, head = i / r.length % r.heads, row = i / r.length / r.heads;
    const T *d = d_out + row * r.row_step + head * r.head_step + t * r.step;
    const T *c = cos + (row * r.length + t) * half, *s = sin + (row * r.length + t) * half;
    for (long pair = 0; pair < half; pair++) {
      const float a = number(d[pair]), b = number(d[half + pair]);
      store(d_x + i * r.width + r.place(pair, false), a * number(c[pair]) + b * number(s[pair]));
      store(d_x + i * r.width + r.place(pair, true), b * number(c[pair]) - a * number(s[pair]));
    }
  }
}
