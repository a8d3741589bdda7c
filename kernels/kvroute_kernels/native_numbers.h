// How compiled code reads the numbers of a cache: included by each of this folder's .cpp files.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t MOST = 1024;  // entries a head that fit the buffers
constexpr int FIELDS = 16;      // of a plane, see planes.py

typedef float Eight __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));

template <typename V, typename S>
inline V loaded(const S* x) {
  V y;
  std::memcpy(&y, x, sizeof y);
  return y;
}

// Of each dtype: 16 entries as two times eight (`entries`; entry d of them is then at `entry_at(d)`), and 16 tokens as those at
// even and at odd places (`tokens`, `weights` in the same order; lane l is then at `lane_at(l)`). The orders are what is cheap.
struct InOrder {
  static inline int64_t entry_at(int64_t d) { return d; }
  static inline int64_t lane_at(int64_t l) { return l < 2 || l > 5 ? l : (l < 4 ? l + 2 : l - 2); }
  static inline void dealt(Eight low, Eight high, Eight& even, Eight& odd) {
    even = __builtin_shufflevector(low, high, 0, 2, 8, 10, 4, 6, 12, 14);
    odd = __builtin_shufflevector(low, high, 1, 3, 9, 11, 5, 7, 13, 15);
  }
  static inline void weights(const float* x, Eight& even, Eight& odd) {
    dealt(loaded<Eight>(x), loaded<Eight>(x + 8), even, odd);
  }
};
struct Float32 : InOrder {
  using Stored = float;
  static inline float number(float x) { return x; }
  static inline void entries(const float* x, Eight& a, Eight& b) { a = loaded<Eight>(x), b = loaded<Eight>(x + 8); }
  static inline void tokens(const float* x, Eight& even, Eight& odd) { weights(x, even, odd); }
};
struct BFloat16 {
  using Stored = uint16_t;
  static inline float number(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    return loaded<float>(&bits);
  }
  static inline void tokens(const uint16_t* x, Eight& even, Eight& odd) {
    const Words two = loaded<Words>(x);  // little-endian: the first is in the lower half
    even = (Eight)(two << 16), odd = (Eight)(two & 0xffff0000u);
  }
  static inline void entries(const uint16_t* x, Eight& a, Eight& b) { tokens(x, a, b); }
  static inline int64_t entry_at(int64_t d) { return d / 16 * 16 + (d % 16) / 2 + d % 2 * 8; }
  static inline int64_t lane_at(int64_t l) { return l; }
  static inline void weights(const float* x, Eight& even, Eight& odd) {
    const Eight low = loaded<Eight>(x), high = loaded<Eight>(x + 8);
    even = __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14);
    odd = __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15);
  }
};
struct Float16 : InOrder {
  using Stored = _Float16;
#ifdef __F16C__
  static inline float number(_Float16 x) { return _cvtsh_ss(loaded<uint16_t>(&x)); }
  static inline Eight eight(const _Float16* x) { return (Eight)_mm256_cvtph_ps(loaded<__m128i>(x)); }
#else
  static inline float number(_Float16 x) { return static_cast<float>(x); }
  static inline Eight eight(const _Float16* x) {
    Eight y;
    for (int i = 0; i < 8; ++i) y[i] = number(x[i]);
    return y;
  }
#endif
  static inline void entries(const _Float16* x, Eight& a, Eight& b) { a = eight(x), b = eight(x + 8); }
  static inline void tokens(const _Float16* x, Eight& even, Eight& odd) { dealt(eight(x), eight(x + 8), even, odd); }
};
thread_local const float* float8_table = nullptr;
struct Float8 : InOrder {
  using Stored = uint8_t;
  static inline float number(uint8_t x) { return float8_table[x]; }
  static inline void entries(const uint8_t* x, Eight& a, Eight& b) {
    for (int i = 0; i < 8; ++i) a[i] = number(x[i]), b[i] = number(x[i + 8]);
  }
  static inline void tokens(const uint8_t* x, Eight& even, Eight& odd) {
    Eight low, high;
    entries(x, low, high);
    dealt(low, high, even, odd);
  }
};

// Calls work(T{}) with the struct of a cache's dtype: 0 float32, 1 bfloat16, 2 float16, 3 float8 by the table of 256.
template <typename Work>
inline void with_dtype(int kind, const float* table, Work work) {
  float8_table = table;
  if (kind == 0)
    work(Float32{});
  else if (kind == 1)
    work(BFloat16{});
  else if (kind == 2)
    work(Float16{});
  else
    work(Float8{});
}

}  // namespace
