// The rotation of queries and keys by their positions, as `rotate` in model/rope.py computes it.
#pragma once
#include "training.h"

struct Rotated { // numbers (rows, heads, length, width), whose last axis is adjacent
  long rows, heads, length, width, row_step, head_step, step; // the steps are those of the input
  bool interleaved;
};

struct Pairs { // how pairs lie in a row: from a pair to the next, and from the first number of a pair to the second
  long step, apart;
};

// The rotation of x (rows, heads, length, width) by cosines and sines (rows, length, width / 2), in halves. With
// `backward`, the gradient of x from that of its rotation, which is the opposite rotation.
template <class T>
static void rotate(T *to, const T *from, const T *cos, const T *sin, const Rotated &r, bool backward, int threads) {
  const long half = r.width / 2;
  const Pairs halves{1, half}, of_x = r.interleaved ? Pairs{2, 1} : halves;
  const Pairs read = backward ? halves : of_x, written = backward ? of_x : halves;
  const float direction = backward ? -1 : 1;
#pragma omp parallel for num_threads(threads)
  for (long i = 0; i < r.rows * r.heads * r.length; i++) {
    const long t = i % r.length, head = i / r.length % r.heads, row = i / r.length / r.heads;
    const T *in = from + row * r.row_step + head * r.head_step + t * r.step;
    const long angles = (row * r.length + t) * half;
    for (long pair = 0; pair < half; pair++) {
      T *out = to + i * r.width + pair * written.step;
      const float a = number(in[pair * read.step]), b = number(in[pair * read.step + read.apart]);
      const float c = number(cos[angles + pair]), s = number(sin[angles + pair]) * direction;
      store(out, a * c - b * s);
      store(out + written.apart, b * c + a * s);
    }
  }
}
