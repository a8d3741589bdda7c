// One step of the online chains on a CPU: the compiled twin of chain_step.py, built by native_library.py.
//
// A task is a sequence. It reads each of its new tokens once, where they lie, for the mean over layers (z) and for the sums by
// layer together, in runs of up to RUN tokens: with keys that lie transposed, a cache line holds many tokens of one entry. What
// a sequence gives depends on its own numbers and their order alone: sums are taken in float64, token after token.

#include <cmath>
#include <vector>

#include "native_numbers.h"

namespace {

constexpr int64_t RUN = 16, AHEAD_HEADS = 2;

// Numbers of a head of `count` tokens that lie in one page, times scale, to `out` [count, size].
template <typename T>
inline void read_head(const typename T::Stored* x, int64_t token_stride, int64_t entry_stride, int64_t count, int64_t size,
                      float scale, float* __restrict out) {
  if (count == 1) {
    for (int64_t d = 0; d < size; ++d) out[d] = T::number(x[d * entry_stride]) * scale;
  } else if (token_stride == 1) {
    for (int64_t d = 0; d < size; ++d)
      for (int64_t t = 0; t < count; ++t) out[t * size + d] = T::number(x[d * entry_stride + t]) * scale;
  } else {
    for (int64_t t = 0; t < count; ++t)
      for (int64_t d = 0; d < size; ++d) out[t * size + d] = T::number(x[t * token_stride + d * entry_stride]) * scale;
  }
}

// Asks for a head of one token before it is needed: each of its entries may lie in a line of its own.
inline void ask(const char* x, int64_t entry_bytes, int64_t size) {
  const int64_t step = entry_bytes >= 64 ? 1 : 64 / entry_bytes;
  for (int64_t d = 0; d < size; d += step) __builtin_prefetch(x + d * entry_bytes);
}

struct Squares {
  double moved = 0, before = 0, now = 0;
};

inline Squares squares_of(const float* a, const float* b, int64_t width) {
  double moved[4] = {}, before[4] = {}, now[4] = {};
  for (int64_t f = 0; f < width; ++f) {
    const double x = a[f], y = b[f], step = static_cast<double>(b[f] - a[f]);
    moved[f % 4] += step * step, before[f % 4] += x * x, now[f % 4] += y * y;
  }
  const auto sum = [](const double* x) { return (x[0] + x[2]) + (x[1] + x[3]); };
  return {sum(moved), sum(before), sum(now)};
}

// 2 atan2(|u - v|, |u + v|) of the unit vectors.
inline double angle_of(const float* a, const float* b, int64_t width, const Squares& of) {
  const double by_a = 1 / std::sqrt(of.before), by_b = 1 / std::sqrt(of.now);
  double apart = 0, along = 0;
  for (int64_t f = 0; f < width; ++f) {
    const double u = a[f] * by_a, v = b[f] * by_b;
    apart += (u - v) * (u - v), along += (u + v) * (u + v);
  }
  return 2 * std::atan2(std::sqrt(apart), std::sqrt(along));
}

}  // namespace

// Sequences low..high. The caller has checked every range, page and size.
//
// planes [2 * layers, 16] int64, keys of all layers before values, see planes.py; scales [planes]; ranges [sequences, 4] int64:
// first token, tokens, chain, place of the first step; the chains' states as ChainTensors has them, vectors [chains, width];
// steps [tokens, 4] float64: magnitude, angle, squared magnitude, squared norm; sums [sequences, layers, width] float32.
extern "C" int kvroute_chain_step(const int64_t* planes, const float* scales, int64_t layers, int64_t heads,
                                  const int64_t* ranges, float* first, float* last, int64_t* counts, double* magnitudes,
                                  double* angles, bool* degenerate, int64_t width, double* steps, float* sums, int kind,
                                  const float* table, int64_t low, int64_t high) {
  static thread_local std::vector<double> z, total;
  static thread_local std::vector<float> means;
  alignas(64) static thread_local float numbers[MOST * RUN];
  for (int64_t p = 0; p < 2 * layers; ++p)
    if (planes[p * FIELDS + 5] > MOST) return 1;
  const int64_t values_at = heads * planes[5];
  with_dtype(kind, table, [&](auto dtype) {
    using T = decltype(dtype);
    using Stored = typename T::Stored;
    for (int64_t sequence = low; sequence < high; ++sequence) {
      const int64_t begin = ranges[sequence * 4], count = ranges[sequence * 4 + 1], chain = ranges[sequence * 4 + 2];
      float *first_z = first + chain * width, *last_z = last + chain * width;
      double* step = steps + ranges[sequence * 4 + 3] * 4;
      if (sums) total.assign(layers * width, 0.0);
      for (int64_t done = 0; done < count;) {
        const int64_t some = count - done < RUN ? count - done : RUN;
        z.assign(some * width, 0.0);
        for (int64_t p = 0; p < 2 * layers; ++p) {
          const int64_t* plane = planes + p * FIELDS;
          const int64_t size = plane[5], page_size = plane[6];
          const auto* pages = reinterpret_cast<const int64_t*>(plane[8]) + sequence * plane[9];
          const int64_t slot = begin + done + reinterpret_cast<const int64_t*>(plane[11])[sequence];
          const auto at = [&](const int64_t* of, int64_t head, int64_t token) {
            const int64_t page = token / of[6];
            return reinterpret_cast<const Stored*>(of[0]) +
                   reinterpret_cast<const int64_t*>(of[8])[sequence * of[9] + page] * of[1] + head * of[2] + (token - page * of[6]) * of[3];
          };
          for (int64_t h = 0; h < heads; ++h) {
            const int64_t next_p = h + AHEAD_HEADS < heads ? p : p + 1;
            if (next_p < 2 * layers) {
              const int64_t* next = planes + next_p * FIELDS;
              const int64_t next_h = (h + AHEAD_HEADS) % heads;
              ask(reinterpret_cast<const char*>(at(next, next_h, begin + done + reinterpret_cast<const int64_t*>(next[11])[sequence])), next[4] * sizeof(Stored), next[5]);
            }
            const int64_t place = (p < layers ? 0 : values_at) + h * size;
            for (int64_t t = 0; t < some;) {
              const int64_t page = (slot + t) / page_size, row = slot + t - page * page_size;
              const int64_t run = page_size - row < some - t ? page_size - row : some - t;
              const Stored* x = reinterpret_cast<const Stored*>(plane[0]) + pages[page] * plane[1] + h * plane[2] + row * plane[3];
              read_head<T>(x, plane[3], plane[4], run, size, scales[p], numbers);
              for (int64_t i = 0; i < run; ++i) {
                double* mean = z.data() + (t + i) * width + place;
                const float* number = numbers + i * size;
                for (int64_t d = 0; d < size; ++d) mean[d] += number[d];
                if (sums) {
                  double* sum = total.data() + p % layers * width + place;
                  for (int64_t d = 0; d < size; ++d) sum[d] += number[d];
                }
              }
              t += run;
            }
          }
        }
        means.resize(width);
        for (int64_t t = 0; t < some; ++t, step += 4) {
          for (int64_t f = 0; f < width; ++f) means[f] = static_cast<float>(z[t * width + f] / layers);
          const bool fresh = counts[chain] == 0;
          const Squares of = squares_of(fresh ? means.data() : last_z, means.data(), width);
          step[0] = step[1] = step[2] = 0, step[3] = of.now;
          if (fresh) {
            std::memcpy(first_z, means.data(), width * sizeof(float));
          } else {
            const double angle = angle_of(last_z, means.data(), width, of);
            step[0] = std::sqrt(of.moved), step[2] = of.moved;
            magnitudes[chain] += step[0];
            if (std::isnan(angle))
              degenerate[chain] = true;
            else
              step[1] = angle, angles[chain] += angle;
          }
          std::memcpy(last_z, means.data(), width * sizeof(float));
          counts[chain] += 1;
        }
        done += some;
      }
      if (sums)
        for (int64_t i = 0; i < layers * width; ++i) sums[sequence * layers * width + i] = static_cast<float>(total[i]);
    }
  });
  return 0;
}

// Adds sums by layer to states and gives their squared lengths: the twin of `feed_layers` in chain_step.py.
//
// states [chains, layers, width] float64; rows [sequences] int64, a chain each; sums [sequences, layers, width] float32; norms
// [sequences, layers, 2] float64: squared distance from the layer before (0 for the first), squared norm; spans [sequences]
// float64: squared distance of the last layer from the first.
extern "C" void kvroute_feed_layers(double* states, const int64_t* rows, const float* sums, int64_t sequences, int64_t layers,
                                    int64_t width, double* norms, double* spans) {
  for (int64_t s = 0; s < sequences; ++s) {
    double* state = states + rows[s] * layers * width;
    const float* sum = sums + s * layers * width;
    double* norm = norms + s * layers * 2;
    for (int64_t l = 0; l < layers; ++l) {
      double *now = state + l * width, moved[4] = {}, square[4] = {};
      const double* before = l ? now - width : now;
      for (int64_t f = 0; f < width; ++f) {
        const double x = now[f] + static_cast<double>(sum[l * width + f]), step = l ? x - before[f] : 0;
        now[f] = x;
        moved[f % 4] += step * step, square[f % 4] += x * x;
      }
      norm[l * 2] = (moved[0] + moved[2]) + (moved[1] + moved[3]);
      norm[l * 2 + 1] = (square[0] + square[2]) + (square[1] + square[3]);
    }
    double span[4] = {};
    const double* newest = state + (layers - 1) * width;
    for (int64_t f = 0; f < width; ++f) span[f % 4] += (newest[f] - state[f]) * (newest[f] - state[f]);
    spans[s] = (span[0] + span[2]) + (span[1] + span[3]);
  }
}
