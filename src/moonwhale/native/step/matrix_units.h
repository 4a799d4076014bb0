// Products of bf16 matrices with many rows, by the matrix units of AMX or by the dot products of AVX-512. Before
// anything else, ask `may_use_units` whether this processor has one of them.
//
// All sizes are multiples of 32. Operands are read in tiles of 512 numbers, 16 by 32, the 32 being numbers of a sum:
// a left operand by rows, a right operand by pairs of rows, its columns between them.
#pragma once
#include <cstdlib>
#include <memory>
#include <new>

#include "checks.h"
#include "products.h"

#if defined __AMX_BF16__ && defined __AMX_TILE__ && defined __AVX512BF16__ // operands are packed with AVX-512
#define HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

constexpr long SQUARE = 32, TILE_ROWS = 16, TILE = TILE_ROWS * SQUARE;

// Number (r, k) is data[r / 16 * tile + k / 32 * block + r % 16 * step + k % 32].
struct Left {
  const bf16 *data;
  long step, tile, block;
  Left below(long rows) const { return {data + rows / TILE_ROWS * tile, step, tile, block}; }
};
INLINE Left plain_rows(const bf16 *data, long step) { return {data, step, TILE_ROWS * step, SQUARE}; }
INLINE Left tiled_rows(const bf16 *data, long n) { return {data, SQUARE, TILE_ROWS * n, TILE}; }

// Number (k, c) of a right operand (n, columns) is in tile (c / 16, k / 32), at k % 32 / 2 * 32 + c % 16 * 2 + k % 2.

// Uninitialised numbers, aligned to a cache line
template <class T> struct Array {
  std::unique_ptr<T, decltype(&std::free)> numbers;
  explicit Array(std::initializer_list<int64_t> sizes)
      : numbers((T *)std::aligned_alloc(64, count(sizes) * sizeof(T) / 64 * 64 + 64), &std::free) {
    if (!numbers) throw std::bad_alloc();
  }
  operator T *() const { return numbers.get(); }
};

#ifdef __AVX512BF16__
// Turns 16 rows of 16 pairs, `step` numbers apart, into their transpose in which pairs stay whole: a left operand's tile
// into a right operand's, and back
INLINE void transpose_pairs(bf16 *to, const bf16 *from, long step) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; r++) a[r] = _mm512_loadu_si512(from + r * step);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const __m512i even = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), odd = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
    const __m512i even_below = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    const __m512i odd_below = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
    _mm512_storeu_si512(to + j * 32, _mm512_shuffle_i32x4(even, even_below, 0x88));
    _mm512_storeu_si512(to + (4 + j) * 32, _mm512_shuffle_i32x4(odd, odd_below, 0x88));
    _mm512_storeu_si512(to + (8 + j) * 32, _mm512_shuffle_i32x4(even, even_below, 0xdd));
    _mm512_storeu_si512(to + (12 + j) * 32, _mm512_shuffle_i32x4(odd, odd_below, 0xdd));
  }
}

// Turns 32 rows of 16 numbers into a right operand's tile
INLINE void pair_rows(bf16 *to, const bf16 *from, long step) {
#pragma GCC unroll 4
  for (int pair = 0; pair < 16; pair++) {
    const bf16 *even = from + 2 * pair * step, *odd = even + step;
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)even));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)odd));
    _mm512_storeu_si512(to + pair * 32, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}
#else
INLINE void transpose_pairs(bf16 *, const bf16 *, long) {}
INLINE void pair_rows(bf16 *, const bf16 *, long) {}
#endif

#ifdef HAS_AMX
// Linux gives a process these units when it asks.
static bool may_use_units() {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

// While it lives, this thread's units hold 8 tiles.
struct Units {
  Units() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    std::fill_n(shape.bytes, 8, 64);
    std::fill_n(shape.rows, 8, TILE_ROWS);
    asm volatile("" ::: "memory");
    _tile_loadconfig(&shape);
  }
  ~Units() { _tile_release(); }
};

// c (32, 32) = a (32, n) * b (n, 32), where columns 16 to 31 of b begin `b_tile` numbers after the first 16
INLINE void square_product(float *c, long c_step, Left a, const bf16 *b, long b_tile, long n) {
  asm volatile("" ::: "memory"); // g++ 12 does not know that a tile is read from memory, nor g++ 11 a sum as an address
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (long k = 0; k < n / SQUARE; k++) {
    _tile_loadd(4, (a.data + k * a.block), a.step * sizeof(bf16));
    _tile_loadd(6, (b + k * TILE), 64);
    _tile_loadd(7, (b + k * TILE + b_tile), 64);
    _tile_loadd(5, (a.data + k * a.block + a.tile), a.step * sizeof(bf16));
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_step * sizeof(float));
  _tile_stored(1, (c + TILE_ROWS), c_step * sizeof(float));
  _tile_stored(2, (c + TILE_ROWS * c_step), c_step * sizeof(float));
  _tile_stored(3, (c + TILE_ROWS * c_step + TILE_ROWS), c_step * sizeof(float));
  asm volatile("" ::: "memory");
}
#elif defined __AVX512BF16__
static bool may_use_units() { return true; }
struct Units {};

INLINE void square_product(float *c, long c_step, Left a, const bf16 *b, long b_tile, long n) {
  constexpr int ROWS = 8; // whose sums fit the registers
  for (long first = 0; first < SQUARE; first += ROWS) {
    const bf16 *rows = a.data + first / TILE_ROWS * a.tile + first % TILE_ROWS * a.step;
    __m512 total[ROWS][2] = {};
    for (long k = 0; k < n / SQUARE; k++)
      for (long pair = 0; pair < 16; pair++) {
        const __m512bh left = (__m512bh)_mm512_loadu_si512(b + k * TILE + pair * 32);
        const __m512bh right = (__m512bh)_mm512_loadu_si512(b + k * TILE + b_tile + pair * 32);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
          const __m512bh both = (__m512bh)_mm512_set1_epi32(read<int>(rows + k * a.block + r * a.step + 2 * pair));
          total[r][0] = _mm512_dpbf16_ps(total[r][0], both, left);
          total[r][1] = _mm512_dpbf16_ps(total[r][1], both, right);
        }
      }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
      for (int half = 0; half < 2; half++)
        _mm512_storeu_ps(c + (first + r) * c_step + half * TILE_ROWS, total[r][half]);
  }
}
#else
static bool may_use_units() { return false; }
struct Units {};
INLINE void square_product(float *, long, Left, const bf16 *, long, long) {}
#endif

// c (rows, columns) = a (rows, n) * b (n, columns)
INLINE void unit_product(float *c, long c_step, Left a, const bf16 *b, long rows, long n, long columns) {
  for (long column = 0; column < columns; column += SQUARE)
    for (long row = 0; row < rows; row += SQUARE)
      square_product(c + row * c_step + column, c_step, a.below(row), b + column * n, TILE_ROWS * n, n);
}

// The transpose of a matrix (columns, n) as a right operand (n, columns)
INLINE void pack_transposed(bf16 *to, const bf16 *matrix, long columns, long n) {
  for (long column = 0; column < columns; column += TILE_ROWS)
    for (long k = 0; k < n; k += SQUARE, to += TILE) transpose_pairs(to, matrix + column * n + k, n);
}

// The next rows (rows, columns) of a matrix as a right operand: rows `first` and on of the n that it will have
INLINE void pack_rows(bf16 *to, const bf16 *matrix, long first, long rows, long n, long columns) {
  for (long column = 0; column < columns; column += TILE_ROWS)
    for (long row = 0; row < rows; row += SQUARE)
      pair_rows(to + column * n + (first + row) / SQUARE * TILE, matrix + row * columns + column, columns);
}

// The same rows, transposed, as a left operand (columns, n)
INLINE void pack_columns(bf16 *to, const bf16 *matrix, long first, long rows, long n, long columns) {
  bf16 tile[TILE];
  for (long column = 0; column < columns; column += TILE_ROWS)
    for (long row = 0; row < rows; row += SQUARE) {
      pair_rows(tile, matrix + row * columns + column, columns);
      transpose_pairs(to + column * n + (first + row) / SQUARE * TILE, tile, 32);
    }
}
