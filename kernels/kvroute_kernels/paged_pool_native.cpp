// Sums of keys and values over tokens on a CPU: the compiled twin of paged_pool.py, built by paged_pool_native.py.
//
// A task is one head of one plane (keys or values of one layer) of one sequence. It reads its tokens once, in their order,
// where they lie. Of 16 tokens, counted from the range's start, numbers 2 i and 2 i + 1 are added and go to lane i, all in
// float32; after a chunk the lanes are folded and added in float64. So a sum's bits follow from the numbers and their order
// alone: not from pages, strides, neighbours or threads.

#include "native_numbers.h"

namespace {

constexpr int64_t GROUP = 16, LANES = 8;
constexpr int64_t CHUNK = 2048;
constexpr int64_t AHEAD = 2048;  // bytes that are asked for before they are needed

inline void ahead(const void* x) { __builtin_prefetch(static_cast<const char*>(x) + AHEAD); }

template <typename T, bool WEIGHTED>
void task(const int64_t* plane, float scale, int64_t head, int64_t sequence, int64_t first, int64_t count, const float* weights,
          float* __restrict out, float* __restrict sums, double* __restrict total, float* __restrict spread) {
  using Stored = typename T::Stored;
  const auto* base = reinterpret_cast<const Stored*>(plane[0]) + head * plane[2];
  const int64_t page_stride = plane[1], token_stride = plane[3], entry_stride = plane[4], size = plane[5], page_size = plane[6];
  const auto* table = reinterpret_cast<const int64_t*>(plane[8]) + sequence * plane[9];
  const int64_t slot = first + reinterpret_cast<const int64_t*>(plane[11])[sequence];
  const bool rows = token_stride == 1 && entry_stride != 1, columns = entry_stride == 1;
  const auto place = [&](int64_t t) {
    const int64_t page = (slot + t) / page_size;
    return base + table[page] * page_stride + (slot + t - page * page_size) * token_stride;
  };
  const int64_t blocks = columns ? size / 16 * 16 : 0;
  const auto at = [&](int64_t l, int64_t d) {
    return rows ? d * LANES + T::lane_at(l) : l * size + (d < blocks ? T::entry_at(d) : d);
  };
  std::memset(total, 0, sizeof(double) * size);
  for (int64_t chunk = 0; chunk < count; chunk += CHUNK) {
    const int64_t end = chunk + CHUNK < count ? chunk + CHUNK : count;
    std::memset(sums, 0, sizeof(float) * size * LANES);
    for (int64_t t = chunk; t < end;) {
      const int64_t left = page_size - (slot + t) % page_size;
      const int64_t run = (left < end - t ? left : end - t) / GROUP * GROUP;
      const float* w = WEIGHTED ? weights + t : nullptr;
      if (run > 0 && rows) {
        const Stored* x = place(t);
        for (int64_t d = 0; d < size; ++d) {
          const Stored* row = x + d * entry_stride;
          Eight sum = loaded<Eight>(sums + d * LANES);
          for (int64_t i = 0; i < run; i += GROUP) {
            Eight even, odd, first_weights, other_weights;
            ahead(row + i);
            T::tokens(row + i, even, odd);
            if (WEIGHTED) T::weights(w + i, first_weights, other_weights);
            sum += WEIGHTED ? even * first_weights + odd * other_weights : even + odd;
          }
          std::memcpy(sums + d * LANES, &sum, sizeof sum);
        }
        t += run;
      } else if (run > 0 && columns) {
        const Stored* start = place(t);
        for (int64_t i = 0; i < run; i += GROUP)
          for (int64_t l = 0; l < LANES; ++l) {
            const Stored *x = start + (i + 2 * l) * token_stride, *y = x + token_stride;
            const float u = WEIGHTED ? w[i + 2 * l] : 1.0f, v = WEIGHTED ? w[i + 2 * l + 1] : 1.0f;
            float* sum = sums + l * size;
            for (int64_t d = 0; d < blocks; d += 16) {
              Eight a, b, c, e;
              ahead(x + d), ahead(y + d);
              T::entries(x + d, a, b), T::entries(y + d, c, e);
              const Eight low = loaded<Eight>(sum + d) + (WEIGHTED ? a * u + c * v : a + c);
              const Eight high = loaded<Eight>(sum + d + 8) + (WEIGHTED ? b * u + e * v : b + e);
              std::memcpy(sum + d, &low, sizeof low), std::memcpy(sum + d + 8, &high, sizeof high);
            }
            for (int64_t d = blocks; d < size; ++d) {
              const float low = T::number(x[d]), high = T::number(y[d]);
              sum[d] += WEIGHTED ? low * u + high * v : low + high;
            }
          }
        t += run;
      } else {  // a group that crosses pages, the end, or strides of another kind: brought together first
        const int64_t some = GROUP < end - t ? GROUP : end - t;
        std::memset(spread, 0, sizeof(float) * size * GROUP);
        for (int64_t i = 0; i < some; ++i) {
          const Stored* x = place(t + i);
          for (int64_t d = 0; d < size; ++d) {
            const float y = T::number(x[d * entry_stride]);
            spread[i * size + d] = WEIGHTED ? y * w[i] : y;
          }
        }
        for (int64_t l = 0; l < LANES; ++l)
          for (int64_t d = 0; d < size; ++d)
            sums[at(l, d)] += spread[2 * l * size + d] + spread[(2 * l + 1) * size + d];
        t += some;
      }
    }
    for (int64_t d = 0; d < size; ++d) {
      const auto lane = [&](int64_t l) { return sums[at(l, d)]; };
      total[d] += ((lane(0) + lane(4)) + (lane(2) + lane(6))) + ((lane(1) + lane(5)) + (lane(3) + lane(7)));
    }
  }
  for (int64_t d = 0; d < size; ++d) out[d] = static_cast<float>(total[d] * scale);
}

template <typename T>
void either(const int64_t* plane, float scale, int64_t head, int64_t sequence, const int64_t* range, const float* weights,
            float* out) {
  alignas(64) static thread_local float sums[MOST * LANES], spread[MOST * GROUP];
  alignas(64) static thread_local double total[MOST];
  if (weights)
    task<T, true>(plane, scale, head, sequence, range[0], range[1], weights + range[2], out, sums, total, spread);
  else
    task<T, false>(plane, scale, head, sequence, range[0], range[1], nullptr, out, sums, total, spread);
}

}  // namespace

// Tasks low..high of sequences * planes * heads. The caller has checked every range, page and size.
//
// planes [planes, 16] int64, see planes.py; scales [planes]; ranges [sequences, 3] int64: first token, tokens, first weight;
// weights or null; out [sequences, width] float32; kind: 0 float32, 1 bfloat16, 2 float16, 3 float8 by the table of 256.
extern "C" int kvroute_paged_pool(const int64_t* planes, const float* scales, int64_t num_planes, int64_t heads,
                                  const int64_t* ranges, const float* weights, float* out, int64_t width, int kind,
                                  const float* table, int64_t low, int64_t high) {
  bool fits = true;
  with_dtype(kind, table, [&](auto dtype) {
    for (int64_t at = low; at < high; ++at) {
      const int64_t sequence = at / (num_planes * heads), plane_at = at / heads % num_planes, head = at % heads;
      const int64_t* plane = planes + plane_at * FIELDS;
      if (plane[5] > MOST) {
        fits = false;
        return;
      }
      float* place = out + sequence * width + plane[12] + head * plane[5];
      either<decltype(dtype)>(plane, scales[plane_at], head, sequence, ranges + sequence * 3, weights, place);
    }
  });
  return fits ? 0 : 1;
}
