// Vectors of 32-, 16- and 8-bit numbers, and matrix products with few rows, which read a weight at memory bandwidth.
//
// The order of a sum depends only on its length, not on the number of rows or threads.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <type_traits>

#include "structures.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr long PANEL_WIDTH = 64;               // outputs of a panel, as in packed_linear.py
constexpr int MAX_ROWS = LANES == 16 ? 6 : 2;  // rows multiplied with a panel at once: as many as fit the registers
constexpr long WIDEN_FROM_ROWS = 3 * MAX_ROWS; // with so many rows a panel is first converted to floats, which is exact
constexpr long WIDEN_UP_TO_INPUTS = 2048;      // of a panel that is converted
#define INLINE [[gnu::always_inline]] inline

constexpr long whole_vectors(long n) { return (n + LANES - 1) / LANES * LANES; } // n, rounded up

struct bf16 {
  uint16_t bits;
};
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Whole __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

template <class To> INLINE To read(const void *from) {
  To x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

INLINE Vector load(const float *x) { return read<Vector>(x); }
#ifdef __AVX512F__ // compilers do not find these instructions by themselves
INLINE Vector load(const bf16 *x) {
  return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16);
}
INLINE Vector load(const int8_t *x) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x)));
}
#elif defined __AVX2__
INLINE Vector load(const bf16 *x) {
  return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x)), 16);
}
INLINE Vector load(const int8_t *x) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)x)));
}
#else
INLINE Vector load(const bf16 *x) { return (Vector)(__builtin_convertvector(read<Halves>(x), Whole) << 16); }
INLINE Vector load(const int8_t *x) {
  return __builtin_convertvector(__builtin_convertvector(read<Bytes>(x), Whole), Vector);
}
#endif

INLINE float number(float x) { return x; }
INLINE float number(bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  return read<float>(&bits);
}
INLINE float number(int8_t x) { return x; }

INLINE void store(float *to, float x) { *to = x; }
INLINE void store(bf16 *to, float x) { // rounds to nearest, ties to even
  uint32_t bits = read<uint32_t>(&x);
  to->bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE float sum(Vector x) {
  typedef float Quarter __attribute__((vector_size(16)));
  Quarter part[LANES / 4];
  std::memcpy(part, &x, sizeof part);
  for (int n = LANES / 8; n; n /= 2)
    for (int i = 0; i < n; i++) part[i] += part[i + n];
  return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}

// exp(x) for x <= 0, as 2^whole * 2^rest with |rest| <= 1/2. The second factor is a Taylor series.
INLINE Vector exponential(Vector x) {
  x *= 1.44269504f;
  x = x < -126.0f ? Vector{} - 126.0f : x;
  Whole whole = __builtin_convertvector(x - 0.5f, Whole);
  Vector z = (x - __builtin_convertvector(whole, Vector)) * 0.693147181f, y = z / 720 + 1.0f / 120;
  y = y * z + 1.0f / 24;
  y = y * z + 1.0f / 6;
  y = y * z + 0.5f;
  y = y * z + 1.0f;
  y = y * z + 1.0f;
  return y * (Vector)((whole + 127) << 23);
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// Calls `run` with a pointer of the type that `dtype` says
template <class Run> INLINE void typed(Dtype dtype, const void *data, Run run) {
  if (dtype == FP32) run((const float *)data);
  else if (dtype == BF16) run((const bf16 *)data);
  else run((const int8_t *)data);
}
template <class Run> INLINE void typed(Dtype dtype, void *data, Run run) {
  if (dtype == FP32) run((float *)data);
  else run((bf16 *)data);
}

// --- products --------------------------------------------------------------------------------------------------------

// Calls emit(o, r, w[o] . x[r]) for OUTS rows of w and ROWS rows of x
template <int OUTS, int ROWS, class W, class Emit>
INLINE void tile(const float *x, long x_step, const W *w, long w_step, long n, Emit emit) {
  Vector total[OUTS][ROWS] = {};
  long i = 0;
  for (; i + LANES <= n; i += LANES) {
    Vector in[ROWS];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) in[r] = load(x + r * x_step + i);
#pragma GCC unroll 6
    for (int o = 0; o < OUTS; o++) {
      Vector weight = load(w + o * w_step + i);
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; r++) total[o][r] += weight * in[r];
    }
  }
#pragma GCC unroll 6
  for (int o = 0; o < OUTS; o++)
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      float rest = 0;
      for (long j = i; j < n; j++) rest += number(w[o * w_step + j]) * x[r * x_step + j];
      emit(o, r, sum(total[o][r]) + rest);
    }
}

// `tile` for any number of rows of w
template <int ROWS, class W, class Emit>
INLINE void dots(const float *x, long x_step, const W *w, long w_step, long outs, long n, Emit emit) {
  long o = 0;
  auto at = [&](int i, int r, float y) { emit(o + i, r, y); };
  for (; o + 4 <= outs; o += 4) tile<4, ROWS>(x, x_step, w + o * w_step, w_step, n, at);
  for (; o < outs; o++) tile<1, ROWS>(x, x_step, w + o * w_step, w_step, n, at);
}

// y[r] = sum over k of p[r][k] * v[k], for ROWS rows of p and VECTORS * LANES columns of v. Sums run in order of k.
template <int ROWS, int VECTORS, class V>
INLINE void mix_columns(float *y, long y_step, const float *p, long p_step, const V *v, long v_step, long n) {
  Vector total[ROWS][VECTORS] = {};
  for (long k = 0; k < n; k++)
#pragma GCC unroll 6
    for (int c = 0; c < VECTORS; c++) {
      Vector value = load(v + k * v_step + c * LANES);
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; r++) total[r][c] += value * p[r * p_step + k];
    }
#pragma GCC unroll 6
  for (int c = 0; c < VECTORS; c++)
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) std::memcpy(y + r * y_step + c * LANES, &total[r][c], sizeof(Vector));
}

// `mix_columns` for any number of columns
template <int ROWS, class V>
INLINE void mix(float *y, long y_step, const float *p, long p_step, const V *v, long v_step, long n, long width) {
  long c = 0;
  for (; c + 4 * LANES <= width; c += 4 * LANES) mix_columns<ROWS, 4>(y + c, y_step, p, p_step, v + c, v_step, n);
  for (; c + LANES <= width; c += LANES) mix_columns<ROWS, 1>(y + c, y_step, p, p_step, v + c, v_step, n);
  for (; c < width; c++)
    for (int r = 0; r < ROWS; r++) {
      float total = 0;
      for (long k = 0; k < n; k++) total += p[r * p_step + k] * number(v[k * v_step + c]);
      y[r * y_step + c] = total;
    }
}

// Writes the outputs of one panel w (in, 64) of m to y (rows, out), for x (rows, in), or adds them if `add`
template <class W>
static void panel_rows(float *y, const float *x, long x_step, long rows, const Matrix &m, const W *w, long first,
                       bool add) {
  const long outs = std::min<long>(m.out - first, PANEL_WIDTH);
  long r = 0;
  auto next = [&](auto some) {
    constexpr int ROWS = decltype(some)::value;
    float sums[ROWS * PANEL_WIDTH];
    mix<ROWS>(sums, PANEL_WIDTH, x + r * x_step, x_step, w, PANEL_WIDTH, m.in, PANEL_WIDTH);
    for (int i = 0; i < ROWS; i++, r++)
      for (long o = 0; o < outs; o++) {
        float total = sums[i * PANEL_WIDTH + o];
        if (m.scale) total *= m.scale[first + o];
        if (m.bias) total += m.bias[first + o];
        float &out = y[r * m.out + first + o];
        out = add ? out + total : total;
      }
  };
  while (r + MAX_ROWS <= rows) next(std::integral_constant<int, MAX_ROWS>());
  if (rows - r == 5) next(std::integral_constant<int, 5>());
  if (rows - r == 4) next(std::integral_constant<int, 4>());
  if (rows - r == 3) next(std::integral_constant<int, 3>());
  if (rows - r == 2) next(std::integral_constant<int, 2>());
  if (rows - r == 1) next(std::integral_constant<int, 1>());
}

static void panel_product(float *y, const float *x, long x_step, long rows, const Matrix &m, long panel, bool add) {
  typed(m.dtype, m.data, [&](auto *w) {
    const long first = panel * PANEL_WIDTH, numbers = m.in * PANEL_WIDTH;
    w += panel * numbers;
    if (m.dtype == FP32 || rows < WIDEN_FROM_ROWS || m.in > WIDEN_UP_TO_INPUTS)
      return panel_rows(y, x, x_step, rows, m, w, first, add);
    static thread_local float wide[WIDEN_UP_TO_INPUTS * PANEL_WIDTH];
    for (long i = 0; i < numbers; i += LANES) {
      Vector some = load(w + i);
      std::memcpy(&wide[i], &some, sizeof some);
    }
    panel_rows(y, x, x_step, rows, m, (const float *)wide, first, add);
  });
}

static long panels(const Matrix &m) { return (m.out + PANEL_WIDTH - 1) / PANEL_WIDTH; }

static void product(float *y, const float *x, long x_step, long rows, const Matrix &m, bool add = false) {
#pragma omp for
  for (long panel = 0; panel < panels(m); panel++) panel_product(y, x, x_step, rows, m, panel, add);
}

static float inverse_rms(const float *x, long width, float eps) {
  float square = 0;
  tile<1, 1>(x, 0, x, 0, width, [&](int, int, float total) { square = total; });
  return 1 / std::sqrt(square / width + eps);
}

static void rms_norm(float *y, long y_step, const float *x, long x_step, long rows, long width, const Norm &norm) {
#pragma omp for
  for (long r = 0; r < rows; r++) {
    const float *in = x + r * x_step;
    float inverse = inverse_rms(in, width, norm.eps);
    for (long i = 0; i < width; i++) y[r * y_step + i] = in[i] * inverse * norm.weight[i];
  }
}

