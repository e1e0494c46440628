// SPDX-License-Identifier: Apache-2.0
// STLM in C99: a file, rows of text, logits. No dependencies, no global state.
//
//   bytes -> embeddings -> local encoder --pool--> trunk (once per patch) --unpool--> + -> local decoder -> logits
//
// The equations and names are those of the Python modules. All functions work on n tokens at once: n bytes of a prompt, one
// byte of n rows, or any mixture (`forward`). Every sum is added up in an order that depends neither on n nor on the
// instructions in use, products are not fused into sums, and what a C library rounds in its own way is computed here. So a
// text has the same logits to the last bit alone or in a batch, in one piece or byte by byte, and on every CPU.
//
// Shapes: n tokens, p patches, D byte width, G trunk width, H heads, K head width, S patches of a row so far, V vocabulary.
#include "stlm.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF  // GCC: -std=c99 or -ffp-contract=off
#endif

enum { LANES = 16, MAX_TOKENS = 64, MAX_CONTEXT = 64, PART = 128, MAX_BYTES = 1 << 27, MAX_DOUBLINGS = 4, MAX_LOOKUPS = 6, FORMAT_VERSION = 4 };

#ifndef __GNUC__
#error "compile with GCC or Clang (clang-cl on Windows): vectors are written with their extension of C"
#endif
#define INLINE static inline __attribute__((always_inline))
#define OUTLINE __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 16")

#ifdef __x86_64__
#define HAS_X86
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__wasm_simd128__)
#include <wasm_simd128.h>
#endif

INLINE int round_up(int n, int step) { return (n + step - 1) / step * step; }
INLINE int max_int(int a, int b) { return a > b ? a : b; }
INLINE int min_int(int a, int b) { return a < b ? a : b; }
INLINE int32_t bits_of(float a) { int32_t bits; memcpy(&bits, &a, 4); return bits; }
INLINE float float_of(int32_t bits) { float a; memcpy(&a, &bits, 4); return a; }

// ---- The model ----

typedef enum { F32 = 0, Q4 = 2, Q8 = 24, BF16 = 30 } Type;  // numbers of GGUF: F32, Q4_0, I8, BF16

enum { Q4_BLOCK = 32, Q4_BLOCK_BYTES = 18 };  // of one Q4_0 block: a half precision scale, 32 numbers of 4 bits

// A matrix (out, in), stored by packs of 16 outputs so that a product needs no sums across lanes:
//   F32, BF16  [out / 16][in][16]
//   Q8         [out / 16][in / 4][16][4]                 int8, a scale per output
//   Q4         [out / 16][in / 32][4][16][4]             inputs i and i + 16 of 32 in a byte, a scale per output and 32 inputs
typedef struct {
  Type type;
  int out, in;
  void *weights;
  float *scales;  // Q8: (out), Q4: [out / 16][in / 32][16]
  int32_t *sums;  // Q8: (out) sum of the row times 128
} Matrix;

// Rows that are looked up, as they are in the file.
typedef struct {
  Type type;
  int width;
  const uint8_t *rows;
  const float *scales;  // Q8: one per row
} Table;

typedef struct {
  int heads, groups, width;  // H, heads of keys and values, K
  Matrix qkv, out;
  const float *q_norm, *k_norm;
  const float *periods;  // (K / 2) rotary embedding: position / period is an angle
} Attention;

typedef struct {
  const float *norm;
  Matrix up, down;
} FeedForward;

typedef struct {
  int is_attention;
  size_t state;  // where its floats start in the state of a row
  const float *norm;
  Matrix in_proj, out_proj;  // of a convolution
  float *taps;  // (N, D), oldest byte first
  Attention attention;
  FeedForward feed_forward;
} ByteLayer;

typedef struct {
  const float *norm;
  Attention attention;
} AttentionBlock;

typedef enum { SPACELIKE, FIXED, VOCABULARY, LEARNED } Rule;
typedef enum { RELU2, RELU, SILU } Activation;

// Keys and values of an attention, `room` slots a page; where they begin in each: keys [groups][room / 16][K][16], values
// [groups][room][K rounded up to 16].
typedef struct {
  char *const *pages;
  int room;
  size_t keys, values;
} Kept;

// The functions that are compiled for several sets of instructions.
typedef struct Kernels {
  const char *name;
  void (*forward)(stlm_batch *, int n);
  void (*product)(stlm_batch *, const Matrix *, const float *x, int n, float *y);
  void (*norm)(const float *x, const float *weight, float eps, int n, int width, float *to);
  void (*add_row)(const Table *, int64_t row, float *to);
  void (*attend)(stlm_batch *, const Attention *, int i, float *projected, Kept kept, int slot, int first, int count,
                 float *to);
} Kernels;

typedef struct Block { struct Block *next; } Block;

struct stlm_model {
  stlm_about about;
  const Kernels *kernels;
  Block *memory;  // everything that was allocated
  int vocab, width, num_encoder, num_byte_layers, taps, window;
  float eps;
  Activation activation;
  Table embedding;
  Matrix head;
  int num_orders, orders[16], has_words, ngram_rows, ngram_size;
  Table ngrams;
  Matrix ngram_proj;
  int64_t powers[MAX_CONTEXT];
  int match_bytes, match_doublings;
  Table match_following, match_length;
  int num_lookups, lookups[MAX_LOOKUPS], lookup_places;  // in-context n-grams, and how many places of each
  Table lookup_following;
  ByteLayer *byte_layers;
  Rule rule;
  int cap_bytes, cap_characters, num_edges;
  const int32_t *edges;  // of the trie of a vocabulary: (node, byte) as node * 256 + byte, sorted
  Matrix router_q, router_k;
  Matrix patch_proj, byte_proj;
  const float *start, *final_norm, *trunk_norm;
  int trunk_width, trunk_window, num_passes;
  const int32_t *attention_of, *feed_forward_of;  // (num_passes)
  AttentionBlock *attention_blocks;
  FeedForward *feed_forward_blocks;
  size_t open_sum, visible, output, before, state_floats;  // offsets in the state of a row, and its size
  int widest, widest_head;
  int item;  // bytes of a number in the keys and values that are kept: 2 (bfloat16) with integer weights, else 4
};

// What changes with every byte and has a fixed size is in `at` and `state`; the rest is only appended to.
typedef struct {
  int32_t num_bytes, num_patches, open_bytes;
  int32_t rule;  // spacelike: complete characters since the last word; vocabulary: node of the walk
} Position;

typedef struct { uint32_t digest; int32_t end; } Slot;  // of a gram, and one past the last byte of its last place (0: free)

// The last place of every gram of some length.
typedef struct {
  int32_t *earlier;  // (bytes) the `end` before of the gram that ends at a byte
  Slot *slots;
  int num_slots, num_grams;  // a power of two; slots in use
} Index;

typedef struct {
  Position at;
  float *state;
  uint16_t *ids;  // (bytes)
  uint64_t *digests;  // (bytes) of the text up to each byte, to know it again
  Index matches[MAX_DOUBLINGS + 1];  // of grams of match_bytes, twice and four times as many, ...
  Index lookups[MAX_LOOKUPS];
  int byte_room, patch_room;
  int32_t *patch_ends;  // (patches) bytes up to the end of each
  char **pages;  // keys and values of PART patches each, of all passes; NULL past the last that was needed
} Row;

struct stlm_snapshot {
  const stlm_model *model;
  Position at;
  uint64_t digest;
  float state[];
};

struct stlm_batch {
  const stlm_model *model;
  int num_rows;
  Row *rows;
  char error[STLM_ERROR_SIZE];
  int row_of[MAX_TOKENS], id_of[MAX_TOKENS], at_of[MAX_TOKENS], patch_at[MAX_TOKENS];
  int patch_row[MAX_TOKENS], patch_index[MAX_TOKENS];
  float share[MAX_TOKENS];
  float *hidden, *before, *new_patches, *patches, *x, *y;  // (n, D) three times, (n, G), (n, widest) twice
  float *cosines, *sines;  // (n, K / 2)
  float *part;  // (widest)
  float *scores;  // (H / groups, S)
  int score_room;
  uint8_t *quantized;  // (n, widest) plus 128
  float scale_of[MAX_TOKENS];
  int32_t *block_sums;  // (n, widest / 32)
  int32_t *chosen;  // (V)
  uint8_t *is_chosen;  // (V)
};

// ---- Elementary functions: the same bits everywhere, which those of a C library are not ----

// Within 2 units in the last place; between e**-87 and e**88.
INLINE float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float round = 12582912.0f;  // 1.5 * 2**23: the sum has no fraction bits
  float k = (x * 1.44269504f + round) - round;
  float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // The last digits of k + round are k, also where x is no number: no conversion to an integer, which would be undefined.
  return p * float_of((int32_t)(((uint32_t)bits_of(k + round) + 127u) << 23));
}

static void sine_and_cosine(float angle, float *sine, float *cosine) {
  double x = angle;
  int64_t k = (int64_t)(x * 0.63661977236758134 + 0.5);
  double r = (x - (double)k * 1.5707963267341256) - (double)k * 6.0771005065061922e-11;
  double s = r * r, sin = 1.0, cos = 1.0;
  for (int i = 17; i > 1; i -= 2) {
    sin = 1.0 - sin * s / (double)(i * (i - 1));
    cos = 1.0 - cos * s / (double)((i - 1) * (i - 2));
  }
  sin *= r;
  *sine = (float)(k & 1 ? (k & 2 ? -cos : cos) : (k & 2 ? -sin : sin));
  *cosine = (float)(k & 1 ? (k & 2 ? sin : -sin) : (k & 2 ? -cos : cos));
}

// Sums run over 16 lanes, which are added in pairs at the end: compilers make vectors of the inner loops.
INLINE float sum_of_lanes(float *lanes) {
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

INLINE float sum_of(const float *x, int n) {
  float lanes[LANES] = {0};
  int i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int lane = 0; lane < LANES; lane++) lanes[lane] += x[i + lane];
  float sum = sum_of_lanes(lanes);
  for (; i < n; i++) sum += x[i];
  return sum;
}

INLINE float largest_of(const float *x, int n) {
  float lanes[LANES], largest = x[0];
  int i = 0;
  for (int lane = 0; lane < LANES; lane++) lanes[lane] = x[0];
  for (; i + LANES <= n; i += LANES)
    for (int lane = 0; lane < LANES; lane++) lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
  for (int lane = 0; lane < LANES; lane++) largest = lanes[lane] > largest ? lanes[lane] : largest;
  for (; i < n; i++) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

INLINE float dot(const float *a, const float *b, int n) {
  float lanes[LANES] = {0};
  int i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int lane = 0; lane < LANES; lane++) lanes[lane] += a[i + lane] * b[i + lane];
  float sum = sum_of_lanes(lanes);
  for (; i < n; i++) sum += a[i] * b[i];
  return sum;
}

INLINE void add_to(float *x, const float *y, int n) {
  for (int i = 0; i < n; i++) x[i] += y[i];
}

// LayerNorm without a bias of `x` (n, width); `to` may be `x`.
INLINE void norm(const float *x, const float *weight, float eps, int n, int width, float *to) {
  for (; n > 0; n--, x += width, to += width) {
    const float mean = sum_of(x, width) / (float)width;
    for (int i = 0; i < width; i++) to[i] = x[i] - mean;
    const float scale = 1.0f / sqrtf(dot(to, to, width) / (float)width + eps);
    for (int i = 0; i < width; i++) to[i] = to[i] * scale * weight[i];
  }
}

INLINE void activate(Activation kind, float *x, int n) {
  if (kind == SILU) {
    for (int i = 0; i < n; i++) x[i] = x[i] / (1.0f + exp_of(-x[i]));
  } else {
    for (int i = 0; i < n; i++) x[i] = x[i] > 0.0f ? x[i] : 0.0f;
    if (kind == RELU2)
      for (int i = 0; i < n; i++) x[i] *= x[i];
  }
}

// Scores to probabilities, in place.
INLINE void softmax(float *x, int n) {
  const float largest = largest_of(x, n);
  for (int i = 0; i < n; i++) x[i] = exp_of(x[i] - largest);
  float scale = 1.0f / sum_of(x, n);
  for (int i = 0; i < n; i++) x[i] *= scale;
}

// ---- Products: y (n, out) = x (n, in) times a matrix ----
//
// A kernel computes the sums of 1 or 4 packs for 1 or 4 vectors, as sums[vector][pack * 16 + lane]. Kernels differ in speed
// only. Packs of weights lie `pack_step` bytes apart, those of consecutive inputs `step` bytes, vectors `x_step` items.

typedef void (*FloatSums)(const void *w, size_t step, size_t pack_step, int in, const float *x, size_t x_step, int packs,
                          int vectors, float *sums);
typedef void (*Q8Sums)(const int8_t *w, size_t pack_step, int quads, const uint8_t *x, size_t x_step, const int32_t *row_sums,
                       int packs, int vectors, int32_t *sums);
typedef void (*Q4Sums)(const uint8_t *w, const float *scales, int blocks, const uint8_t *x, const int32_t *x_sums,
                       float *sums);

// Vectors of BYTES; ONE and FOUR packs at a time for one and for four vectors, so that sums stay in registers.
#define FLOAT_SUMS(name, TARGET, BYTES, ONE, FOUR, ITEM, TO_FLOATS)                                                        \
  TARGET INLINE void block_##name(const char *w, size_t step, size_t pack_step, int in, const float *x, size_t x_step,     \
                                  float *sums, size_t sums_step, const int PACKS, const int VECTORS) {                     \
    typedef float Floats __attribute__((vector_size(BYTES)));                                                              \
    typedef float Store __attribute__((vector_size(BYTES), aligned(4), may_alias));                                        \
    typedef uint32_t Words __attribute__((vector_size(BYTES), unused));                                                    \
    typedef ITEM Items __attribute__((vector_size(BYTES / 4 * sizeof(ITEM)), aligned(sizeof(ITEM)), may_alias));           \
    enum { PARTS = 64 / BYTES };                                                                                           \
    Floats total[4][4][PARTS];                                                                                             \
    UNROLL for (int v = 0; v < VECTORS; v++)                                                                               \
      UNROLL for (int p = 0; p < PACKS; p++)                                                                               \
        UNROLL for (int i = 0; i < PARTS; i++) total[v][p][i] = (Floats){0};                                               \
    for (int at = 0; at < in; at++, w += step)                                                                             \
      UNROLL for (int p = 0; p < PACKS; p++)                                                                               \
        UNROLL for (int i = 0; i < PARTS; i++) {                                                                           \
          const Floats weights = TO_FLOATS(((const Items *)(const void *)(w + (size_t)p * pack_step))[i]);                 \
          UNROLL for (int v = 0; v < VECTORS; v++) total[v][p][i] += weights * x[(size_t)v * x_step + (size_t)at];         \
        }                                                                                                                  \
    UNROLL for (int v = 0; v < VECTORS; v++)                                                                               \
      UNROLL for (int p = 0; p < PACKS; p++)                                                                               \
        UNROLL for (int i = 0; i < PARTS; i++) ((Store *)(sums + (size_t)v * sums_step + p * LANES))[i] = total[v][p][i];  \
  }                                                                                                                        \
  TARGET OUTLINE void name(const void *w, size_t step, size_t pack_step, int in, const float *x, size_t x_step,     \
                                  int packs, int vectors, float *sums) {                                                   \
    const size_t sums_step = (size_t)packs * LANES;                                                                        \
    const int some = packs == 1 ? 1 : vectors == 1 ? ONE : FOUR;                                                           \
    for (int p = 0; p < packs; p += some, sums += some * LANES) {                                                          \
      const char *from = (const char *)w + (size_t)p * pack_step;                                                          \
      if (packs == 1 && vectors == 1) block_##name(from, step, pack_step, in, x, x_step, sums, sums_step, 1, 1);           \
      else if (packs == 1) block_##name(from, step, pack_step, in, x, x_step, sums, sums_step, 1, 4);                      \
      else if (vectors == 1) block_##name(from, step, pack_step, in, x, x_step, sums, sums_step, ONE, 1);                  \
      else block_##name(from, step, pack_step, in, x, x_step, sums, sums_step, FOUR, 4);                                   \
    }                                                                                                                      \
  }
#define FROM_F32(items) (items)
#define FROM_BF16(items) ((Floats)(__builtin_convertvector(items, Words) << 16))
FLOAT_SUMS(sums_f32_scalar, , 16, 2, 1, float, FROM_F32)
FLOAT_SUMS(sums_bf16_scalar, , 16, 2, 1, uint16_t, FROM_BF16)

OUTLINE void sums_q8_scalar(const int8_t *w, size_t pack_step, int quads, const uint8_t *x, size_t x_step,
                            const int32_t *row_sums, int packs, int vectors, int32_t *sums) {
  for (int v = 0; v < vectors; v++, x += x_step)
    for (int p = 0; p < packs; p++, sums += LANES) {
      const int8_t *from = w + (size_t)p * pack_step;
      int32_t total[LANES];
      for (int lane = 0; lane < LANES; lane++) total[lane] = -row_sums[p * LANES + lane];  // takes back the 128 added to x
      for (int q = 0; q < quads; q++, from += 4 * LANES) {
        const int32_t a = x[q * 4], b = x[q * 4 + 1], c = x[q * 4 + 2], d = x[q * 4 + 3];
        for (int lane = 0; lane < LANES; lane++) {
          const int8_t *four = from + lane * 4;
          total[lane] += a * four[0] + b * four[1] + c * four[2] + d * four[3];
        }
      }
      memcpy(sums, total, sizeof total);
    }
}

OUTLINE void sums_q4_scalar(const uint8_t *w, const float *scales, int blocks, const uint8_t *x, const int32_t *x_sums,
                           float *sums) {
  for (int lane = 0; lane < LANES; lane++) sums[lane] = 0.0f;
  for (int b = 0; b < blocks; b++, w += 256, x += Q4_BLOCK, scales += LANES) {
    for (int lane = 0; lane < LANES; lane++) {
      int32_t sum = -8 * x_sums[b];
      for (int q = 0; q < 4; q++)
        for (int i = 0; i < 4; i++) {
          uint8_t two = w[q * 64 + lane * 4 + i];
          sum += (two & 15) * (x[q * 4 + i] - 128) + (two >> 4) * (x[16 + q * 4 + i] - 128);
        }
      sums[lane] += (float)sum * scales[lane];
    }
  }
}

INLINE int32_t quad_of(const uint8_t *x) { int32_t four; memcpy(&four, x, 4); return four; }

// 128-bit vectors, which every x86-64 and arm64 has, and WebAssembly with -msimd128.
#if defined(HAS_X86) || defined(__aarch64__) || defined(__wasm_simd128__)
#define HAS_SIMD128
typedef int16_t Shorts __attribute__((vector_size(16)));
typedef uint16_t UShorts __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t UInts __attribute__((vector_size(16)));
typedef float Floats4 __attribute__((vector_size(16)));

// `repeat`: x[0] to x[3] twice. `add_pairs`: adds w[0] x[0] + w[1] x[1], w[2] x[2] + w[3] x[3], and so on.
#if defined(__wasm_simd128__)
INLINE UShorts repeat(const uint8_t *x) { return (UShorts)wasm_u16x8_extend_low_u8x16(wasm_v128_load32_splat(x)); }
INLINE Ints add_pairs(Ints total, const int8_t *w, Shorts x) {
  return total + (Ints)wasm_i32x4_dot_i16x8(wasm_i16x8_load8x8(w), (v128_t)x);
}
#elif defined(__aarch64__)
INLINE UShorts repeat(const uint8_t *x) { return (UShorts)vmovl_u8(vreinterpret_u8_s32(vdup_n_s32(quad_of(x)))); }
INLINE Ints add_pairs(Ints total, const int8_t *w, Shorts x) {
  return (Ints)vpadalq_s16((int32x4_t)total, vmull_s8(vld1_s8(w), vmovn_s16((int16x8_t)x)));
}
#else
INLINE UShorts repeat(const uint8_t *x) {
  return (UShorts)_mm_unpacklo_epi8(_mm_set1_epi32(quad_of(x)), _mm_setzero_si128());
}
INLINE Ints add_pairs(Ints total, const int8_t *w, Shorts x) {
  const __m128i eight = _mm_loadl_epi64((const void *)w);
  return total + (Ints)_mm_madd_epi16(_mm_srai_epi16(_mm_unpacklo_epi8(eight, eight), 8), (__m128i)x);
}
#endif

OUTLINE void sums_q8_simd128(const int8_t *w, size_t pack_step, int quads, const uint8_t *x, size_t x_step,
                             const int32_t *row_sums, int packs, int vectors, int32_t *sums) {
  (void)row_sums;
  for (int v = 0; v < vectors; v++, x += x_step)
    for (int p = 0; p < packs; p++, sums += LANES) {
      const int8_t *from = w + (size_t)p * pack_step;
      Ints pairs[8] = {{0}};  // two of each lane
      for (int q = 0; q < quads; q++, from += 4 * LANES) {
        const Shorts four = (Shorts)(repeat(x + 4 * q) - 128);
        UNROLL for (int i = 0; i < 8; i++) pairs[i] = add_pairs(pairs[i], from + i * 8, four);
      }
      for (int lane = 0; lane < LANES; lane++)
        sums[lane] = pairs[lane / 2][lane % 2 * 2] + pairs[lane / 2][lane % 2 * 2 + 1];
    }
}

// Of two bytes of weights w and W in 16 bits, inputs are w & 15 (first), w >> 4 (third), W & 15 (second), W >> 4 (fourth).
OUTLINE void sums_q4_simd128(const uint8_t *w, const float *scales, int blocks, const uint8_t *x, const int32_t *x_sums,
                             float *sums) {
  Floats4 total[4] = {{0}};
  for (int b = 0; b < blocks; b++, w += 256, x += Q4_BLOCK, scales += LANES) {
    UShorts pairs[4] = {{0}};  // two of each lane, sums of up to 16 products of 15 * 127
    for (int q = 0; q < 4; q++) {
      const UInts low = (UInts){0} + (uint32_t)quad_of(x + q * 4), high = (UInts){0} + (uint32_t)quad_of(x + 16 + q * 4);
      const UShorts first = (UShorts)(low & 0x00ff00ff) - 128, second = (UShorts)(low >> 8 & 0x00ff00ff) - 128;
      const UShorts third = (UShorts)(high & 0x00ff00ff) - 128, fourth = (UShorts)(high >> 8 & 0x00ff00ff) - 128;
      UNROLL for (int i = 0; i < 4; i++) {
        UShorts four;
        memcpy(&four, w + q * 64 + i * 16, 16);
        pairs[i] += (four & 15) * first + (four >> 8 & 15) * second + (four >> 4 & 15) * third + (four >> 12) * fourth;
      }
    }
    UNROLL for (int i = 0; i < 4; i++) {
      Floats4 scale;
      memcpy(&scale, scales + 4 * i, 16);
      const Ints sum = ((Ints)((UInts)pairs[i] << 16) >> 16) + ((Ints)pairs[i] >> 16) - 8 * x_sums[b];
      total[i] += __builtin_convertvector(sum, Floats4) * scale;
    }
  }
  memcpy(sums, total, sizeof total);
}
#endif

#ifdef HAS_X86
#define AVX2 __attribute__((target("avx2")))
#ifdef __clang__
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#else
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")))
#endif
FLOAT_SUMS(sums_f32_avx2, AVX2, 32, 4, 1, float, FROM_F32)
FLOAT_SUMS(sums_bf16_avx2, AVX2, 32, 4, 1, uint16_t, FROM_BF16)
FLOAT_SUMS(sums_f32_avx512, AVX512, 64, 4, 4, float, FROM_F32)
FLOAT_SUMS(sums_bf16_avx512, AVX512, 64, 4, 4, uint16_t, FROM_BF16)

// |x| times w with the sign of x: 16-bit sums of two products stay below 2 * 127 * 127.
AVX2 OUTLINE void sums_q8_avx2(const int8_t *w, size_t pack_step, int quads, const uint8_t *x, size_t x_step,
                              const int32_t *row_sums, int packs, int vectors, int32_t *sums) {
  const __m256i ones = _mm256_set1_epi16(1), bias = _mm256_set1_epi8((char)128);
  (void)row_sums;
  for (int v = 0; v < vectors; v++, x += x_step)
    for (int p = 0; p < packs; p++, sums += LANES) {
      const int8_t *from = w + (size_t)p * pack_step;
      __m256i low = _mm256_setzero_si256(), high = low;
      for (int q = 0; q < quads; q++, from += 64) {
        __m256i four = _mm256_xor_si256(_mm256_set1_epi32(quad_of(x + 4 * q)), bias), size = _mm256_abs_epi8(four);
        __m256i a = _mm256_sign_epi8(_mm256_loadu_si256((const void *)from), four);
        __m256i b = _mm256_sign_epi8(_mm256_loadu_si256((const void *)(from + 32)), four);
        low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_maddubs_epi16(size, a), ones));
        high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_maddubs_epi16(size, b), ones));
      }
      _mm256_storeu_si256((void *)sums, low);
      _mm256_storeu_si256((void *)(sums + 8), high);
    }
}

AVX2 OUTLINE void sums_q4_avx2(const uint8_t *w, const float *scales, int blocks, const uint8_t *x, const int32_t *x_sums,
                              float *sums) {
  const __m256i ones = _mm256_set1_epi16(1), bias = _mm256_set1_epi8((char)128), mask = _mm256_set1_epi8(15);
  for (int half = 0; half < 2; half++) {
    __m256 total = _mm256_setzero_ps();
    for (int b = 0; b < blocks; b++) {
      __m256i sum = _mm256_setzero_si256();  // of 16 bits: at most 16 products of 15 * 127
      for (int q = 0; q < 4; q++) {
        __m256i two = _mm256_loadu_si256((const void *)(w + b * 256 + q * 64 + half * 32));
        __m256i first = _mm256_xor_si256(_mm256_set1_epi32(quad_of(x + b * Q4_BLOCK + q * 4)), bias);
        __m256i second = _mm256_xor_si256(_mm256_set1_epi32(quad_of(x + b * Q4_BLOCK + 16 + q * 4)), bias);
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(_mm256_and_si256(two, mask), first));
        two = _mm256_and_si256(_mm256_srli_epi16(two, 4), mask);
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(two, second));
      }
      sum = _mm256_sub_epi32(_mm256_madd_epi16(sum, ones), _mm256_set1_epi32(8 * x_sums[b]));
      __m256 scale = _mm256_loadu_ps(scales + b * LANES + half * 8);
      total = _mm256_add_ps(total, _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scale));
    }
    _mm256_storeu_ps(sums + half * 8, total);
  }
}

AVX512 INLINE void block_q8_avx512(const int8_t *w, size_t pack_step, int quads, const uint8_t *x, size_t x_step,
                                  const int32_t *row_sums, int32_t *sums, const int PACKS, const int VECTORS) {
  __m512i total[4][4];
  UNROLL for (int v = 0; v < VECTORS; v++)
    UNROLL for (int p = 0; p < PACKS; p++)
      total[v][p] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(row_sums + p * LANES));
  for (int q = 0; q < quads; q++, w += 64)
    UNROLL for (int p = 0; p < PACKS; p++) {
      const __m512i weights = _mm512_loadu_si512(w + (size_t)p * pack_step);
      UNROLL for (int v = 0; v < VECTORS; v++)
        total[v][p] = _mm512_dpbusd_epi32(total[v][p], _mm512_set1_epi32(quad_of(x + (size_t)v * x_step + 4 * q)), weights);
    }
  UNROLL for (int v = 0; v < VECTORS; v++)
    UNROLL for (int p = 0; p < PACKS; p++) _mm512_storeu_si512(sums + (v * PACKS + p) * LANES, total[v][p]);
}

AVX512 OUTLINE void sums_q8_avx512(const int8_t *w, size_t pack_step, int quads, const uint8_t *x, size_t x_step,
                                  const int32_t *row_sums, int packs, int vectors, int32_t *sums) {
  if (packs == 4 && vectors == 4) block_q8_avx512(w, pack_step, quads, x, x_step, row_sums, sums, 4, 4);
  else if (packs == 4) block_q8_avx512(w, pack_step, quads, x, x_step, row_sums, sums, 4, 1);
  else if (vectors == 4) block_q8_avx512(w, pack_step, quads, x, x_step, row_sums, sums, 1, 4);
  else block_q8_avx512(w, pack_step, quads, x, x_step, row_sums, sums, 1, 1);
}

AVX512 OUTLINE void sums_q4_avx512(const uint8_t *w, const float *scales, int blocks, const uint8_t *x,
                                  const int32_t *x_sums, float *sums) {
  const __m512i bias = _mm512_set1_epi8((char)128), mask = _mm512_set1_epi8(15);
  __m512 total = _mm512_setzero_ps();
  for (int b = 0; b < blocks; b++, w += 256, x += Q4_BLOCK) {
    __m512i low = _mm512_set1_epi32(-8 * x_sums[b]), high = _mm512_setzero_si512();
    for (int q = 0; q < 4; q++) {
      __m512i two = _mm512_loadu_si512(w + q * 64);
      __m512i first = _mm512_xor_si512(_mm512_set1_epi32(quad_of(x + q * 4)), bias);
      __m512i second = _mm512_xor_si512(_mm512_set1_epi32(quad_of(x + 16 + q * 4)), bias);
      low = _mm512_dpbusd_epi32(low, _mm512_and_si512(two, mask), first);
      high = _mm512_dpbusd_epi32(high, _mm512_and_si512(_mm512_srli_epi16(two, 4), mask), second);
    }
    __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(low, high));
    total = _mm512_add_ps(total, _mm512_mul_ps(sum, _mm512_loadu_ps(scales + b * LANES)));
  }
  _mm512_storeu_ps(sums, total);
}
#endif

// Numbers -127 to 127 plus 128, and their scale. Infinities and NaN become a scale that is not finite.
INLINE void quantize(const float *x, int n, int room, uint8_t *to, float *scale, int32_t *block_sums) {
  int32_t largest = 0;  // floats without their sign are in the order of their bits
  for (int i = 0; i < n; i++) {
    int32_t bits = bits_of(x[i]) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float range = float_of(largest);
  float inverse = range > 1e-30f && range < 1e30f ? 127.0f / range : 0.0f;
  for (int i = 0; i < n; i++) to[i] = (uint8_t)((uint32_t)bits_of(x[i] * inverse + 12582912.0f) + 128u);
  for (int i = n; i < room; i++) to[i] = 128;
  *scale = range / 127.0f;
  for (int b = 0; block_sums && b < n / Q4_BLOCK; b++) {
    int32_t sum = 0;
    for (int i = 0; i < Q4_BLOCK; i++) sum += to[b * Q4_BLOCK + i];
    block_sums[b] = sum - 128 * Q4_BLOCK;
  }
}

INLINE void product_of_floats(FloatSums sums_of, const void *weights, size_t step, size_t pack_step, int in, int out,
                              const float *x, size_t x_step, int n, float *y, size_t y_step) {
  for (int o = 0, packs; o < out; o += packs * LANES) {
    packs = out - o > 3 * LANES ? 4 : 1;
    const int count = min_int(packs * LANES, out - o);
    const char *from = (const char *)weights + (size_t)(o / LANES) * pack_step;
    for (int v = 0, vectors; v < n; v += vectors) {
      float sums[4 * 4 * LANES];
      vectors = n - v >= 4 ? 4 : 1;
      sums_of(from, step, pack_step, in, x + (size_t)v * x_step, x_step, packs, vectors, sums);
      for (int j = 0; j < vectors; j++)
        for (int i = 0; i < count; i++) y[(size_t)(v + j) * y_step + (size_t)(o + i)] = sums[j * packs * LANES + i];
    }
  }
}

INLINE void product_of_q8(Q8Sums sums_of, stlm_batch *b, const Matrix *m, const float *x, int n, float *y) {
  const int room = round_up(m->in, 4);
  for (int v = 0; v < n; v++) quantize(x + v * m->in, m->in, room, b->quantized + v * room, b->scale_of + v, NULL);
  for (int o = 0, packs; o < m->out; o += packs * LANES) {
    packs = m->out - o > 3 * LANES ? 4 : 1;
    const int count = min_int(packs * LANES, m->out - o);
    const int8_t *from = (const int8_t *)m->weights + (size_t)o * (size_t)room;
    for (int v = 0, vectors; v < n; v += vectors) {
      int32_t sums[4 * 4 * LANES];
      vectors = n - v >= 4 ? 4 : 1;
      sums_of(from, (size_t)room * LANES, room / 4, b->quantized + v * room, (size_t)room, m->sums + o, packs, vectors, sums);
      for (int j = 0; j < vectors; j++) {
        float *to = y + (v + j) * m->out + o, scale = b->scale_of[v + j];
        for (int i = 0; i < count; i++) to[i] = (float)sums[j * packs * LANES + i] * (m->scales[o + i] * scale);
      }
    }
  }
}

INLINE void product_of_q4(Q4Sums sums_of, stlm_batch *b, const Matrix *m, const float *x, int n, float *y) {
  const int blocks = m->in / Q4_BLOCK;
  for (int v = 0; v < n; v++)
    quantize(x + v * m->in, m->in, m->in, b->quantized + v * m->in, b->scale_of + v, b->block_sums + v * blocks);
  for (int o = 0; o < m->out; o += LANES) {
    const size_t first = (size_t)(o / LANES * blocks);
    for (int v = 0; v < n; v++) {
      float sums[LANES];
      sums_of((const uint8_t *)m->weights + first * 256, m->scales + first * LANES, blocks, b->quantized + v * m->in,
              b->block_sums + v * blocks, sums);
      for (int i = 0; i < min_int(LANES, m->out - o); i++) y[v * m->out + o + i] = sums[i] * b->scale_of[v];
    }
  }
}

// ---- Embeddings ----

INLINE float half_of(uint16_t half) {  // IEEE half precision
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, digits = half & 1023;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float)digits * 5.9604644775390625e-8f;
  return float_of((int32_t)(sign | (exponent == 31 ? 255u : exponent + 112) << 23 | digits << 13));
}

INLINE uint16_t uint16_at(const uint8_t *from) { uint16_t a; memcpy(&a, from, 2); return a; }

// Adds row `row` of a table to `to`.
INLINE void add_row(const Table *t, int64_t row, float *to) {
  int n = t->width;
  if (t->type == F32) {
    add_to(to, (const float *)(const void *)t->rows + row * n, n);
  } else if (t->type == BF16) {
    for (int i = 0; i < n; i++) to[i] += float_of((int32_t)((uint32_t)uint16_at(t->rows + (row * n + i) * 2) << 16));
  } else if (t->type == Q8) {
    for (int i = 0; i < n; i++) to[i] += (float)((const int8_t *)t->rows)[row * n + i] * t->scales[row];
  } else {
    const uint8_t *block = t->rows + row * (n / Q4_BLOCK) * Q4_BLOCK_BYTES;
    for (int at = 0; at < n; at += Q4_BLOCK, block += Q4_BLOCK_BYTES) {
      float scale = half_of(uint16_at(block));
      for (int i = 0; i < 16; i++) {
        to[at + i] += (float)((block[2 + i] & 15) - 8) * scale;
        to[at + i + 16] += (float)((block[2 + i] >> 4) - 8) * scale;
      }
    }
  }
}

enum { SPACE, WORD, CONTINUATION, LEAD3, LEAD4, SPECIAL, MISSING };

INLINE int kind_at(const Row *row, int t) {
  if (t < 0) return MISSING;
  int id = row->ids[t];
  if (id >= 256) return SPECIAL;
  if ((id >= '0' && id <= '9') || (id >= 'A' && id <= 'Z') || (id >= 'a' && id <= 'z')) return WORD;
  if (id < 0x80) return SPACE;
  return id < 0xC0 ? CONTINUATION : id < 0xE0 || id > 0xF7 ? WORD : id < 0xF0 ? LEAD3 : LEAD4;
}

INLINE int is_in_word(int kind) { return kind >= WORD && kind <= LEAD4; }
INLINE int ends_word(const Row *row, int t) { return kind_at(row, t) == SPACE && is_in_word(kind_at(row, t - 1)); }

// One vector of ngram_size for each order, or their sum if there is no projection.
INLINE void ngram_embeddings(const stlm_model *m, const Row *row, int t, float *to, const Kernels *k) {
  const int64_t prime = 2147483647;
  for (int a = 0; a < m->num_orders; a++) {
    int n = m->orders[a];
    int64_t digest = 0;
    for (int back = 0; back < n && back <= t; back++) {
      // A word starts after the byte that ended the one before.
      if (m->has_words && a == m->num_orders - 1 && back > 0 &&
          (ends_word(row, t - back) || kind_at(row, t - back) == SPECIAL))
        break;
      digest += (int64_t)(row->ids[t - back] + 1) * m->powers[n - 1 - back];
    }
    k->add_row(&m->ngrams, digest % prime % m->ngram_rows + (int64_t)a * m->ngram_rows, to);
    if (m->ngram_proj.out) to += m->ngram_size;
  }
}

INLINE int lane_of(int id) { return min_int(id, 256) + 1; }  // 0 stands for no byte

// The last match_bytes up to byte t, 9 bits each, or 0 if there are fewer.
INLINE uint64_t gram_at(const Row *row, int t, int n) {
  uint64_t gram = 0;
  if (t < n - 1) return 0;
  for (int i = t - n + 1; i <= t; i++) gram = gram << 9 | (uint64_t)lane_of(row->ids[i]);
  return gram;
}

// How many times n bytes, up to `most`, are the same up to byte `other` and up to byte t.
INLINE int times_equal(const Row *row, int t, int other, int n, int most) {
  int times = 0;
  for (; times < most; times++) {
    uint64_t gram = gram_at(row, other - times * n, n);
    if (!gram || gram != gram_at(row, t - times * n, n)) break;
  }
  return times;
}

// The slot of the last `times` times n bytes up to byte t, which is free if they stood nowhere before.
INLINE Slot *find_slot(const Row *row, const Index *index, int t, int n, int times, uint32_t digest) {
  size_t mask = (size_t)index->num_slots - 1, at = digest & mask;
  for (; index->slots[at].end; at = (at + 1) & mask)
    if (index->slots[at].digest == digest && times_equal(row, t, index->slots[at].end - 1, n, times) == times) break;
  return index->slots + at;
}

INLINE uint32_t gram_digest(const Row *row, int t, int n, int times) {
  uint64_t digest = 0;
  for (int i = 0; i < times; i++) digest = (digest ^ gram_at(row, t - i * n, n)) * 0x9E3779B97F4A7C15u, digest ^= digest >> 32;
  return (uint32_t)digest;
}

// Enters `times` times n bytes up to byte t; returns the last byte of the place before, or -1.
INLINE int enter_gram(const Row *row, Index *index, int t, int n, int times) {
  if (t < n * times - 1) return -1;
  uint32_t digest = gram_digest(row, t, n, times);
  Slot *slot = find_slot(row, index, t, n, times, digest);
  index->num_grams += slot->end == 0;
  index->earlier[t] = slot->end;
  *slot = (Slot){digest, t + 1};
  return index->earlier[t] - 1;
}

// Takes back what was entered last: its slot was the last to be filled, so that freeing it breaks no search.
static void leave_gram(const Row *row, Index *index, int t, int n, int times) {
  if (t < n * times - 1) return;
  Slot *slot = find_slot(row, index, t, n, times, gram_digest(row, t, n, times));
  slot->end = index->earlier[t];
  index->num_grams -= slot->end == 0;
}

// What followed the last earlier place of the same n bytes, and how many times n bytes up to both are the same, up to 6.
// A place with 2 n, 4 n, ... same bytes, as many as the model doubles, goes before a later one with fewer.
INLINE void match_embedding(const stlm_model *m, Row *row, int t, float *to, const Kernels *k) {
  int place = -1;
  for (int i = 0; i <= m->match_doublings; i++) {
    int found = enter_gram(row, row->matches + i, t, m->match_bytes, 1 << i);
    if (found >= 0) place = found;
  }
  k->add_row(&m->match_following, place >= 0 ? lane_of(row->ids[place + 1]) : 0, to);
  k->add_row(&m->match_length, place >= 0 ? times_equal(row, t, place, m->match_bytes, 6) : 0, to);
}

// The mean over what followed the last places where the last n bytes up to byte t stood, summed over n.
INLINE void context_ngrams(const stlm_model *m, Row *row, int t, float *to, float *sum, const Kernels *k) {
  memset(sum, 0, sizeof(float) * (size_t)m->width);
  for (int a = 0; a < m->num_lookups; a++) {
    int place = enter_gram(row, row->lookups + a, t, m->lookups[a], 1);
    for (int i = 0; i < m->lookup_places; i++) {
      k->add_row(&m->lookup_following, 258 * a + (place >= 0 ? lane_of(row->ids[place + 1]) : 0), sum);
      if (place >= 0) place = row->lookups[a].earlier[place] - 1;
    }
  }
  for (int i = 0; i < m->width; i++) to[i] += sum[i] / (float)m->lookup_places;
}

INLINE void embed(stlm_batch *b, int n, const Kernels *k) {
  const stlm_model *m = b->model;
  const int num_ngram = m->ngram_proj.out ? m->ngram_proj.in : m->width;
  memset(b->hidden, 0, sizeof(float) * (size_t)(n * m->width));
  memset(b->x, 0, sizeof(float) * (size_t)(n * num_ngram));
  for (int i = 0; i < n; i++) {
    Row *row = b->rows + b->row_of[i];
    int t = b->at_of[i] = row->at.num_bytes++;
    row->ids[t] = (uint16_t)b->id_of[i];
    row->digests[t] = ((t ? row->digests[t - 1] : 0xcbf29ce484222325u) ^ (uint64_t)(b->id_of[i] + 1)) * 0x100000001b3u;
    k->add_row(&m->embedding, b->id_of[i], b->hidden + i * m->width);
    if (m->match_bytes) match_embedding(m, row, t, b->hidden + i * m->width, k);
    if (m->num_lookups) context_ngrams(m, row, t, b->hidden + i * m->width, b->part, k);
    if (m->num_orders) ngram_embeddings(m, row, t, m->ngram_proj.out ? b->x + i * num_ngram : b->hidden + i * m->width, k);
  }
  if (m->num_orders && m->ngram_proj.out) {
    k->product(b, &m->ngram_proj, b->x, n, b->y);
    add_to(b->hidden, b->y, n * m->width);
  }
}

// ---- Layers ----

INLINE void feed_forward(stlm_batch *b, const FeedForward *f, float *hidden, int n, const Kernels *k) {
  int width = f->down.out;
  k->norm(hidden, f->norm, b->model->eps, n, width, b->x);
  k->product(b, &f->up, b->x, n, b->y);
  activate(b->model->activation, b->y, n * f->up.out);
  k->product(b, &f->down, b->y, n, b->x);
  add_to(hidden, b->x, n * width);
}

// Gated convolution over the last N bytes. `ring` (N - 1, D) holds the inputs of earlier bytes, byte t at t % (N - 1).
INLINE void convolve(const stlm_model *m, const ByteLayer *layer, float *ring, int t, const float *projected, float *to) {
  const int width = m->width, taps = m->taps;
  const float *gate_in = projected, *gate_out = projected + width, *input = projected + 2 * width;
  for (int d = 0; d < width; d++) to[d] = 0.0f;
  for (int tap = 0; tap < taps - 1; tap++) {
    const float *earlier = ring + (t + tap) % (taps - 1) * width, *weight = layer->taps + tap * width;
    for (int d = 0; d < width; d++) to[d] += weight[d] * earlier[d];
  }
  const float *weight = layer->taps + (taps - 1) * width;
  float *now = taps > 1 ? ring + t % (taps - 1) * width : NULL;
  for (int d = 0; d < width; d++) {
    float gated = gate_in[d] * input[d];
    to[d] = gate_out[d] * (to[d] + weight[d] * gated);
    if (now) now[d] = gated;
  }
}

INLINE void turn(float *x, const float *cosines, const float *sines, int width, float scale) {
  for (int i = 0; i < width / 2; i++) {
    float a = x[i], b = x[i + width / 2];
    x[i] = (a * cosines[i] - b * sines[i]) * scale;
    x[i + width / 2] = (b * cosines[i] + a * sines[i]) * scale;
  }
}

// Angles of the rotary embedding for `position`, as entry i of the batch.
INLINE void set_angles(stlm_batch *b, int i, int position, const Attention *a) {
  for (int k = 0; k < a->width / 2; k++)
    sine_and_cosine((float)position / a->periods[k], b->sines + i * a->width / 2 + k, b->cosines + i * a->width / 2 + k);
}

// A float, or its upper half rounded to nearest, ties to even.
INLINE void keep(char *to, float number, int item) {
  const uint32_t bits = (uint32_t)bits_of(number), rounded = bits + 0x7fff + (bits >> 16 & 1);
  const uint16_t half = (uint16_t)(rounded >> 16);
  if (item == 4) memcpy(to, &number, 4);
  else memcpy(to, &half, 2);
}

// Keeps key and value of token i at `slot` and attends to the slots from `first` to below `count`. `projected` (H + 2 groups,
// K) is changed.
INLINE void attend(FloatSums sums_of, stlm_batch *b, const Attention *a, int i, float *projected, Kept kept, int slot,
                   int first, int count, float *to) {
  const int width = a->width, wide = round_up(width, LANES), queries = a->heads / a->groups, padded = round_up(count, LANES);
  const int item = b->model->item, room = kept.room, within = slot % room, start = first / PART * PART;
  const size_t step = (size_t)(item * LANES), key_step = step * (size_t)width, value_step = (size_t)(item * wide);
  const float *cosines = b->cosines + i * width / 2, *sines = b->sines + i * width / 2;
  const float scale = 1.0f / sqrtf((float)width);
  float *query = projected, *key = query + a->heads * width, *value = key + a->groups * width;
  norm(query, a->q_norm, b->model->eps, a->heads, width, query);
  norm(key, a->k_norm, b->model->eps, a->groups, width, key);
  for (int h = 0; h < a->heads; h++) turn(query + h * width, cosines, sines, width, scale);
  for (int g = 0; g < a->groups; g++) {
    char *const page = kept.pages[slot / room], *row = page + kept.values + (size_t)within * value_step;
    char *column = page + kept.keys + (size_t)(within / LANES) * key_step + within % LANES * item;
    turn(key, cosines, sines, width, 1.0f);
    for (int c = 0; c < width; c++) {
      keep(column + (size_t)c * step, key[c], item);
      keep(row + c * item, value[c], item);
    }
    for (int at = start; at < count; at += room)
      product_of_floats(sums_of, kept.pages[at / room] + kept.keys, step, key_step, width, min_int(room, padded - at), query,
                        (size_t)width, queries, b->scores + at, (size_t)padded);
    for (int q = 0; q < queries; q++) {
      float *scores = b->scores + q * padded;
      memset(scores + start, 0, sizeof(float) * (size_t)(first - start));
      softmax(scores + first, count - first);
    }
    memset(to, 0, sizeof(float) * (size_t)(queries * width));
    for (int at = start; at < count; at += PART) {  // values of so many slots stay in the cache for all queries
      const char *values = kept.pages[at / room] + kept.values + (size_t)(at % room) * value_step;
      product_of_floats(sums_of, values, value_step, step, min_int(PART, count - at), width, b->scores + at, (size_t)padded,
                        queries, b->part, (size_t)width);
      add_to(to, b->part, queries * width);
    }
    query += queries * width, to += queries * width, key += width, value += width;
    kept.keys += (size_t)(room / LANES) * key_step, kept.values += (size_t)room * value_step;
  }
}

INLINE size_t ring_of_keys(const stlm_model *m, const Attention *a) {
  return (size_t)round_up(m->window, LANES) * (size_t)(a->groups * a->width);
}

INLINE void byte_layer(stlm_batch *b, const ByteLayer *layer, int n, const Kernels *k) {
  const stlm_model *m = b->model;
  const int width = m->width;
  const Matrix *in = layer->is_attention ? &layer->attention.qkv : &layer->in_proj;
  const Matrix *out = layer->is_attention ? &layer->attention.out : &layer->out_proj;
  k->norm(b->hidden, layer->norm, m->eps, n, width, b->x);
  k->product(b, in, b->x, n, b->y);
  for (int i = 0; i < n; i++) {
    float *state = b->rows[b->row_of[i]].state + layer->state;
    int t = b->at_of[i];
    if (layer->is_attention) {
      set_angles(b, i, t, &layer->attention);
      char *const page = (char *)state;
      const Kept kept = {&page, round_up(m->window, LANES), 0, sizeof(float) * ring_of_keys(m, &layer->attention)};
      k->attend(b, &layer->attention, i, b->y + i * in->out, kept, t % m->window, 0, min_int(t + 1, m->window),
                b->x + i * out->in);
    } else {
      convolve(m, layer, state, t, b->y + i * in->out, b->x + i * width);
    }
  }
  k->product(b, out, b->x, n, b->y);
  add_to(b->hidden, b->y, n * width);
  feed_forward(b, &layer->feed_forward, b->hidden, n, k);
}

// ---- Patches ----

static int child_of(const stlm_model *m, int node, int id) {
  int64_t edge = (int64_t)node * 256 + id;
  int low = 0, high = m->num_edges;
  while (low < high) {
    int middle = low + (high - low) / 2;
    if (m->edges[middle] < edge) low = middle + 1;
    else high = middle;
  }
  return id < 256 && low < m->num_edges && m->edges[low] == edge ? low + 1 : -1;
}

// Whether a patch ends at byte t, the last of the row. `confidence` is that of a learned rule.
INLINE int ends_patch(const stlm_model *m, Row *row, int t, float confidence) {
  int kind = kind_at(row, t), is_special = kind == SPECIAL, is_full = row->at.open_bytes + 1 == m->cap_bytes;
  switch (m->rule) {
    case FIXED: return is_special || is_full;
    case LEARNED: return is_special || confidence >= 0.5f || is_full;
    case VOCABULARY: {
      int node = child_of(m, row->at.rule, row->ids[t]);
      if (node >= 0) row->at.rule = node;
      else row->at.rule = max_int(0, child_of(m, 0, row->ids[t]));
      return node < 0;
    }
    default: {
      int word_ends = is_special || ends_word(row, t), complete = 0;
      if (kind == CONTINUATION && kind_at(row, t - 1) == CONTINUATION) {
        int second = kind_at(row, t - 2);
        complete = second == LEAD3 || (second == CONTINUATION && kind_at(row, t - 3) == LEAD4);
      }
      row->at.rule = (row->at.rule + complete) % m->cap_characters;
      int ends = word_ends || (complete && row->at.rule == 0) || is_full;
      if (word_ends) row->at.rule = 0;
      return ends;
    }
  }
}

// Probability that a byte ends a patch: how much it is unlike the one before it (H-Net), in shares[i].
INLINE void route(stlm_batch *b, int n, float *shares, const Kernels *k) {
  const stlm_model *m = b->model;
  const int width = m->width;
  k->product(b, &m->router_q, b->hidden, n, b->y);
  for (int i = 0; i < n; i++) {
    float *before = b->rows[b->row_of[i]].state + m->before;
    memcpy(b->x + i * width, before, sizeof(float) * (size_t)width);
    memcpy(before, b->hidden + i * width, sizeof(float) * (size_t)width);
  }
  float *keys = b->y + n * width;
  k->product(b, &m->router_k, b->x, n, keys);
  for (int i = 0; i < n; i++) {
    const float *q = b->y + i * width, *k = keys + i * width;
    float q_size = sqrtf(dot(q, q, width)), k_size = sqrtf(dot(k, k, width));
    q_size = q_size > 1e-8f ? q_size : 1e-8f;
    k_size = k_size > 1e-8f ? k_size : 1e-8f;
    shares[i] = 0.5f - 0.5f * (dot(q, k, width) / (q_size * k_size));
  }
}

// Pools the patches that end among n bytes into b->x (p, 2 D); b->patch_at has the patch of each byte that ends one, or -1.
INLINE int find_patches(stlm_batch *b, int n, const Kernels *k) {
  const stlm_model *m = b->model;
  const int width = m->width;
  int num_patches = 0;
  float shares[MAX_TOKENS] = {0};
  if (m->rule == LEARNED) route(b, n, shares, k);
  for (int i = 0; i < n; i++) {
    Row *row = b->rows + b->row_of[i];
    float *sum = row->state + m->open_sum, *hidden = b->hidden + i * width, *pooled = b->x + num_patches * 2 * width;
    int ends = ends_patch(m, row, b->at_of[i], shares[i]);
    add_to(sum, hidden, width);
    row->at.open_bytes++;
    b->patch_at[i] = ends ? num_patches : -1;
    if (!ends) continue;
    for (int d = 0; d < width; d++) pooled[d] = sum[d] / (float)row->at.open_bytes;
    memcpy(pooled + width, hidden, sizeof(float) * (size_t)width);
    memset(sum, 0, sizeof(float) * (size_t)width);
    row->at.open_bytes = 0;
    // Forced ends, and the first patch of a row, are not smoothed.
    b->share[num_patches] = m->rule != LEARNED || shares[i] < 0.5f || row->at.num_patches == 0 ? 1.0f : shares[i];
    b->patch_row[num_patches] = b->row_of[i];
    row->patch_ends[row->at.num_patches] = b->at_of[i] + 1;
    b->patch_index[num_patches++] = row->at.num_patches++;
  }
  return num_patches;
}

// Bytes of the keys, and of the values, of a page and a pass of the trunk.
INLINE size_t keys_of_pass(const stlm_model *m) {
  const Attention *a = &m->attention_blocks[0].attention;
  return (size_t)(m->item * PART) * (size_t)(a->groups * a->width);
}

INLINE size_t values_of_pass(const stlm_model *m) {
  const Attention *a = &m->attention_blocks[0].attention;
  return (size_t)(m->item * PART) * (size_t)(a->groups * round_up(a->width, LANES));
}

INLINE void run_trunk(stlm_batch *b, int p, const Kernels *k) {
  const stlm_model *m = b->model;
  const int width = m->trunk_width;
  k->product(b, &m->patch_proj, b->x, p, b->patches);
  for (int i = 0; i < p; i++) set_angles(b, i, b->patch_index[i], &m->attention_blocks[0].attention);
  for (int pass = 0; pass < m->num_passes; pass++) {
    const AttentionBlock *block = m->attention_blocks + m->attention_of[pass];
    const Attention *a = &block->attention;
    k->norm(b->patches, block->norm, m->eps, p, width, b->x);
    k->product(b, &a->qkv, b->x, p, b->y);
    for (int i = 0; i < p; i++) {
      const Row *row = b->rows + b->patch_row[i];
      const Kept kept = {row->pages, PART, (size_t)pass * keys_of_pass(m), (size_t)m->num_passes * keys_of_pass(m) +
                         (size_t)pass * values_of_pass(m)};
      const int patch = b->patch_index[i], first = m->trunk_window ? max_int(0, patch + 1 - m->trunk_window) : 0;
      k->attend(b, a, i, b->y + i * a->qkv.out, kept, patch, first, patch + 1, b->x + i * a->out.in);
    }
    k->product(b, &a->out, b->x, p, b->y);
    add_to(b->patches, b->y, p * width);
    feed_forward(b, m->feed_forward_blocks + m->feed_forward_of[pass], b->patches, p, k);
  }
  k->norm(b->patches, m->trunk_norm, m->eps, p, width, b->x);
  k->product(b, &m->byte_proj, b->x, p, b->new_patches);
}

// A byte sees the last patch that is complete.
INLINE void add_visible(stlm_batch *b, int n) {
  const int width = b->model->width;
  for (int i = 0; i < n; i++) {
    float *visible = b->rows[b->row_of[i]].state + b->model->visible;
    int patch = b->patch_at[i];
    if (patch >= 0) {
      const float *latest = b->new_patches + patch * width, share = b->share[patch];
      for (int d = 0; d < width; d++) visible[d] = share == 1.0f ? latest[d] : share * latest[d] + (1.0f - share) * visible[d];
    }
    add_to(b->hidden + i * width, visible, width);
  }
}

// The model on n tokens whose row_of and id_of are set, those of a row in order; b->hidden is the input of the head.
INLINE void forward(stlm_batch *b, int n, const Kernels *k) {
  const stlm_model *m = b->model;
  embed(b, n, k);
  for (int layer = 0; layer < m->num_byte_layers; layer++) {
    if (layer == m->num_encoder) {
      const int num_patches = find_patches(b, n, k);
      if (num_patches) run_trunk(b, num_patches, k);
      add_visible(b, n);
    }
    byte_layer(b, m->byte_layers + layer, n, k);
  }
  k->norm(b->hidden, m->final_norm, m->eps, n, m->width, b->hidden);
  for (int i = 0; i < n; i++)
    memcpy(b->rows[b->row_of[i]].state + m->output, b->hidden + i * m->width, sizeof(float) * (size_t)m->width);
}

// Everything above is compiled once for each set of instructions.
#define KERNELS(isa, TARGET)                                                                                    \
  TARGET static void product_##isa(stlm_batch *b, const Matrix *m, const float *x, int n, float *y) {           \
    const size_t in = (size_t)m->in, out = (size_t)m->out, step = m->type == BF16 ? LANES * 2 : LANES * 4;      \
    const FloatSums sums_of = m->type == BF16 ? sums_bf16_##isa : sums_f32_##isa;                               \
    if (m->type == Q8) product_of_q8(sums_q8_##isa, b, m, x, n, y);                                             \
    else if (m->type == Q4) product_of_q4(sums_q4_##isa, b, m, x, n, y);                                        \
    else product_of_floats(sums_of, m->weights, step, step * in, m->in, m->out, x, in, n, y, out);              \
  }                                                                                                             \
  TARGET static void attend_##isa(stlm_batch *b, const Attention *a, int i, float *projected, Kept kept,        \
                                  int slot, int first, int count, float *to) {                                  \
    const FloatSums sums_of = b->model->item == 2 ? sums_bf16_##isa : sums_f32_##isa;                           \
    attend(sums_of, b, a, i, projected, kept, slot, first, count, to);                                          \
  }                                                                                                             \
  TARGET static void norm_##isa(const float *x, const float *weight, float eps, int n, int width, float *to) {  \
    norm(x, weight, eps, n, width, to);                                                                         \
  }                                                                                                             \
  TARGET static void add_row_##isa(const Table *t, int64_t row, float *to) { add_row(t, row, to); }             \
  static void forward_##isa(stlm_batch *b, int n);                                                              \
  static const Kernels isa = {#isa, forward_##isa, product_##isa, norm_##isa, add_row_##isa, attend_##isa};     \
  TARGET static void forward_##isa(stlm_batch *b, int n) { forward(b, n, &isa); }

#ifndef __wasm_simd128__  // a module for browsers with SIMD has no use for it
KERNELS(scalar, )
#endif
#ifdef HAS_SIMD128
#define sums_f32_simd128 sums_f32_scalar  // vectors of 128 bits already
#define sums_bf16_simd128 sums_bf16_scalar
KERNELS(simd128, )
#endif
#ifdef HAS_X86
KERNELS(avx2, AVX2)
KERNELS(avx512, AVX512)
#endif

static const Kernels *find_kernels(const char *isa) {
#ifdef HAS_X86
  int has_avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  if (has_avx512 && (!*isa || !strcmp(isa, "avx512"))) return &avx512;
  if (__builtin_cpu_supports("avx2") && (!*isa || !strcmp(isa, "avx2"))) return &avx2;
#endif
#ifdef HAS_SIMD128
  if (!*isa || !strcmp(isa, "simd128")) return &simd128;
#endif
#ifndef __wasm_simd128__
  if (!*isa || !strcmp(isa, "scalar")) return &scalar;
#endif
  return NULL;
}

// ---- The file: GGUF, version 3. Every number in it is checked before it is used ----

enum { UINT32 = 4, INT32 = 5, FLOAT32 = 6, STRING = 8, ARRAY = 9, INT32_ARRAY = ARRAY << 8 | INT32 };

typedef struct { const char *text; uint64_t length; } Text;
typedef struct { Text name; uint32_t type; uint64_t count; size_t at; } Entry;  // of the header; `at`: the first item
typedef struct { Text name; uint32_t dims, type; uint64_t shape[4], offset; int is_used; } Tensor;  // innermost size first

typedef struct {
  const uint8_t *bytes;
  size_t size, at, data_at;  // the file, where it is read, where the tensors start
  char *error;
  uint64_t num_entries, num_tensors;
  Entry *entries;
  Tensor *tensors;
  stlm_model *model;
  char prefix[80];  // of the names of tensors
} File;

// The first fault is the one that is reported. After it there are no entries and tensors, and all numbers are zero.
static void fail(File *f, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  if (!*f->error) vsnprintf(f->error, STLM_ERROR_SIZE, format, arguments);
  va_end(arguments);
  f->num_entries = f->num_tensors = 0;
}

static void set_prefix(File *f, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(f->prefix, sizeof f->prefix, format, arguments);
  va_end(arguments);
}

// Zeroed, aligned to 64 bytes, and freed with the model.
static void *take(File *f, size_t size) {
  Block *block = *f->error ? NULL : calloc(1, sizeof *block + size + 64);
  if (!block) {
    fail(f, "not enough memory for the model: %zu bytes more", size);
    return NULL;
  }
  block->next = f->model->memory;
  f->model->memory = block;
  return (void *)(((uintptr_t)(block + 1) + 63) & ~(uintptr_t)63);
}

static const uint8_t *skip(File *f, uint64_t bytes) {
  if (!*f->error && f->size - f->at < bytes)
    fail(f, "the file is truncated: its header does not end within %zu bytes", f->size);
  if (*f->error) return NULL;
  f->at += (size_t)bytes;
  return f->bytes + f->at - bytes;
}

static uint64_t read_number(File *f, int bytes) {
  const uint8_t *from = skip(f, (uint64_t)bytes);
  uint64_t number = 0;
  for (int i = 0; from && i < bytes; i++) number |= (uint64_t)from[i] << (8 * i);
  return number;
}

static Text read_text(File *f) {
  const uint64_t length = read_number(f, 8);
  const char *text = (const char *)skip(f, length);
  return text ? (Text){text, length} : (Text){"", 0};
}

static int is_text(Text text, const char *other) {
  return text.length == strlen(other) && !memcmp(text.text, other, (size_t)text.length);
}

static void read_header(File *f) {
  static const uint8_t sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};  // by type
  if (f->size < 4 || memcmp(skip(f, 4), "GGUF", 4)) fail(f, "this is not a GGUF file");
  const unsigned version = (unsigned)read_number(f, 4);
  if (version != 3) fail(f, "the file has version %u of GGUF, expected 3", version);
  const uint64_t num_tensors = read_number(f, 8), num_entries = read_number(f, 8);
  if (num_tensors > f->size / 12 || num_entries > f->size / 12) fail(f, "the file is truncated");  // 12 bytes each, or more
  f->entries = take(f, sizeof(Entry) * (size_t)num_entries);
  f->tensors = take(f, sizeof(Tensor) * (size_t)num_tensors);
  for (uint64_t i = 0; i < num_entries && !*f->error; i++) {
    Entry *entry = f->entries + i;
    entry->name = read_text(f);
    uint32_t type = entry->type = (uint32_t)read_number(f, 4);
    entry->count = 1;
    if (type == ARRAY) {
      type = (uint32_t)read_number(f, 4);
      entry->type = ARRAY << 8 | (type & 255);
      entry->count = read_number(f, 8);
    }
    entry->at = f->at;
    if (type >= sizeof sizes || type == ARRAY) fail(f, "the header has a value of the unknown type %u", (unsigned)type);
    else if (type != STRING) skip(f, entry->count > f->size ? UINT64_MAX : entry->count * sizes[type]);
    else
      for (uint64_t j = 0; j < entry->count && !*f->error; j++) read_text(f);
  }
  for (uint64_t i = 0; i < num_tensors && !*f->error; i++) {
    Tensor *tensor = f->tensors + i;
    tensor->name = read_text(f);
    tensor->dims = (uint32_t)read_number(f, 4);
    if (tensor->dims > 4) fail(f, "a tensor has %u dimensions", (unsigned)tensor->dims);
    for (uint32_t d = 0; d < tensor->dims && !*f->error; d++) tensor->shape[d] = read_number(f, 8);
    tensor->type = (uint32_t)read_number(f, 4);
    tensor->offset = read_number(f, 8);
  }
  f->data_at = (f->at + 31) / 32 * 32;
  if (f->data_at > f->size) fail(f, "the file is truncated: it ends with its header");
  if (*f->error) return;
  f->num_entries = num_entries;
  f->num_tensors = num_tensors;
}

// Items of an entry, at which the file is then read; 0 if there is none, which is a fault unless `least` is 0.
static int seek(File *f, const char *name, uint32_t type, int least, int most) {
  for (uint64_t i = 0; i < f->num_entries; i++) {
    const Entry *entry = f->entries + i;
    if (!is_text(entry->name, name)) continue;
    f->at = entry->at;
    if (entry->type == type && entry->count >= (uint64_t)least && entry->count <= (uint64_t)most) return (int)entry->count;
    fail(f, "%s has type %u and %llu items, expected type %u and %d to %d", name, (unsigned)entry->type,
         (unsigned long long)entry->count, (unsigned)type, least, most);
  }
  if (least) fail(f, "the header has no %s", name);
  return 0;
}

static int read_int(File *f, const char *name, int64_t low, int64_t high) {
  const int64_t number = seek(f, name, UINT32, 1, 1) ? (int64_t)read_number(f, 4) : low;
  if (number < low || number > high)
    fail(f, "%s is %lld, expected %lld to %lld", name, (long long)number, (long long)low, (long long)high);
  return (int)(*f->error ? low : number);
}

static const int32_t *read_ints(File *f, const char *name, int high, int least, int most, int *count) {
  const int found = seek(f, name, INT32_ARRAY, least, most);
  int32_t *numbers = take(f, sizeof(int32_t) * (size_t)found);
  for (int i = 0; i < found && !*f->error; i++) {
    numbers[i] = (int32_t)(uint32_t)read_number(f, 4);
    if (numbers[i] < 0 || numbers[i] > high) fail(f, "%s has the item %d, expected 0 to %d", name, (int)numbers[i], high);
  }
  *count = *f->error ? 0 : found;
  return numbers;
}

static const char *read_string(File *f, const char *name) {
  const Text text = seek(f, name, STRING, 1, 1) ? read_text(f) : (Text){"", 0};
  char *copy = take(f, (size_t)text.length + 1);
  return copy ? memcpy(copy, text.text, (size_t)text.length) : "";
}

static int read_choice(File *f, const char *name, const char *const *choices, int count) {
  const char *text = read_string(f, name);
  for (int i = 0; i < count; i++)
    if (!strcmp(text, choices[i])) return i;
  fail(f, "this engine does not know %s '%.40s'", name, text);
  return 0;
}

// Continues the sums a and b of Adler-32 (RFC 1950).
static void add_bytes(const uint8_t *bytes, size_t size, uint32_t *a, uint32_t *b) {
  for (size_t i = 0; i < size;) {
    const size_t end = size - i < 5552 ? size : i + 5552;  // before which b cannot overflow
    for (; end - i >= 32; i += 32) {  // in sums that compilers make vectors of
      uint32_t sum = 0, weighted = 0;
      for (uint32_t j = 0; j < 32; j++) {
        sum += bytes[i + j];
        weighted += (32 - j) * bytes[i + j];
      }
      *b += 32 * *a + weighted;
      *a += sum;
    }
    for (; i < end; i++) *b += *a += bytes[i];
    *a %= 65521;
    *b %= 65521;
  }
}

// Adler-32 of the whole file, with its own value in the header taken as zero.
static void verify(File *f) {
  const uint32_t expected = (uint32_t)read_int(f, "stlm.checksum", 0, UINT32_MAX);
  const size_t own = f->at - 4;
  uint32_t a = 1, b = 0;
  if (*f->error) return;
  add_bytes(f->bytes, own, &a, &b);
  add_bytes((const uint8_t[4]){0}, 4, &a, &b);
  add_bytes(f->bytes + own + 4, f->size - own - 4, &a, &b);
  if ((b << 16 | a) != expected)
    fail(f, "the file is damaged or truncated: its checksum is %08x, expected %08x", b << 16 | a, expected);
}

static uint64_t size_of(uint32_t type, uint64_t count) {  // 64 bits: a size of a foreign file must not wrap around
  return type == Q4 ? count / Q4_BLOCK * Q4_BLOCK_BYTES : type == Q8 ? count : type == BF16 ? 2 * count : 4 * count;
}

// Data of the tensor prefix + name of shape (outer, inner), or (inner) if outer is 0; NULL after a fault. If `type` is given,
// any type of weights will do, else float32. A size of 1 in between, as in convolutions, makes no difference.
static const uint8_t *find(File *f, const char *name, int outer, int inner, uint32_t *type) {
  char full[160];
  snprintf(full, sizeof full, "%s%s", f->prefix, name);
  for (uint64_t i = 0; i < f->num_tensors; i++) {
    Tensor *t = f->tensors + i;
    if (!is_text(t->name, full)) continue;
    const uint64_t last = t->dims == 3 ? t->shape[1] == 1 ? t->shape[2] : 0 : t->dims == 2 ? t->shape[1] : 0;
    if (t->shape[0] != (uint64_t)inner || last != (uint64_t)outer || t->dims < 1 || t->dims > 3) {
      fail(f, "the tensor %s has not the shape (%d, %d)", full, outer, inner);
    } else if (!(t->type == F32 || (type && (t->type == BF16 || t->type == Q8 || (t->type == Q4 && inner % Q4_BLOCK == 0))))) {
      fail(f, "the tensor %s has the unknown type %u", full, (unsigned)t->type);
    } else {
      const uint64_t size = size_of(t->type, (uint64_t)inner * (uint64_t)max_int(outer, 1));
      if (t->offset > f->size - f->data_at || f->size - f->data_at - t->offset < size)
        fail(f, "the file is truncated: %s lies behind its end", full);
      if (type) *type = t->type;
      t->is_used = 1;
      return *f->error ? NULL : f->bytes + f->data_at + t->offset;
    }
  }
  fail(f, "the file has no tensor %s", full);
  return NULL;
}

static const void *copy_of(File *f, const uint8_t *data, size_t size) {
  void *copy = data ? take(f, size) : NULL;
  return copy ? memcpy(copy, data, size) : NULL;
}

static const float *read_vector(File *f, const char *name, int n) {
  return copy_of(f, find(f, name, 0, n, NULL), sizeof(float) * (size_t)n);
}

// The scales of an int8 tensor `x.weight` are the tensor `x.scale`.
static const uint8_t *find_scales(File *f, const char *name, int rows) {
  char scales[80];
  snprintf(scales, sizeof scales, "%.*sscale", (int)(strlen(name) - strlen("weight")), name);
  return find(f, scales, 0, rows, NULL);
}

static Table read_table(File *f, const char *name, int rows, int width) {
  uint32_t type = F32;
  const uint8_t *data = find(f, name, rows, width, &type);
  Table table = {(Type)type, width, copy_of(f, data, size_of(type, (size_t)rows * (size_t)width)), NULL};
  if (type == Q8) table.scales = copy_of(f, find_scales(f, name, rows), sizeof(float) * (size_t)rows);
  return table;
}

// Row `from` of `data` becomes row r of the matrix.
static void pack_row(Matrix *m, int r, const uint8_t *data, int from, const uint8_t *scales) {
  const size_t in = (size_t)m->in, row = (size_t)from, pack = (size_t)(r / LANES), lane = (size_t)(r % LANES);
  const size_t blocks = in / Q4_BLOCK, item = m->type == BF16 ? 2 : 4;
  if (m->type == Q8) {
    int8_t *to = (int8_t *)m->weights + pack * (size_t)round_up(m->in, 4) * LANES + lane * 4;
    const int8_t *numbers = (const int8_t *)data + row * in;
    int32_t sum = 0;
    for (size_t i = 0; i < in; i += 4, to += 64)
      for (size_t j = 0; j < 4 && i + j < in; j++) {
        const int number = max_int(-127, numbers[i + j]);
        to[j] = (int8_t)number;
        sum += number;
      }
    m->sums[r] = 128 * sum;
    memcpy(m->scales + r, scales + row * 4, 4);
  } else if (m->type == Q4) {
    for (size_t b = 0; b < blocks; b++) {
      const uint8_t *block = data + (row * blocks + b) * Q4_BLOCK_BYTES;
      uint8_t *to = (uint8_t *)m->weights + (pack * blocks + b) * 256 + lane * 4;
      for (size_t i = 0; i < 16; i++) to[i / 4 * 64 + i % 4] = block[2 + i];
      m->scales[(pack * blocks + b) * LANES + lane] = half_of(uint16_at(block));
    }
  } else {
    char *to = (char *)m->weights + (pack * in * LANES + lane) * item;
    for (size_t i = 0; i < in; i++) memcpy(to + i * LANES * item, data + (row * in + i) * item, item);
  }
}

// The matrices `names` (outs, in), below each other.
static Matrix read_matrices(File *f, const char *const *names, const int *outs, int count, int in) {
  Matrix m = {F32, 0, in, NULL, NULL, NULL};
  for (int i = 0; i < count; i++) m.out += outs[i];
  const size_t rows = (size_t)round_up(m.out, LANES);
  if (in > 32768) fail(f, "%s has more than 32768 inputs", names[0]);  // up to which integer sums fit 32 bits
  for (int i = 0, row = 0; i < count; i++) {
    uint32_t type = F32;
    const uint8_t *data = find(f, names[i], outs[i], in, &type);
    const uint8_t *scales = data && type == Q8 ? find_scales(f, names[i], outs[i]) : NULL;
    if (i == 0) {
      m.type = (Type)type;
      m.weights = take(f, type == Q4 ? rows * (size_t)in / 2 : size_of(type, rows * (size_t)round_up(in, 4)));
      if (type == Q8) m.sums = take(f, sizeof(int32_t) * rows);
      if (type == Q8 || type == Q4) m.scales = take(f, sizeof(float) * rows * (type == Q4 ? (size_t)in / Q4_BLOCK : 1));
    }
    if (type != (uint32_t)m.type) fail(f, "%s has another type than its neighbours", names[i]);
    for (int r = 0; r < outs[i] && !*f->error; r++, row++) pack_row(&m, row, data, r, scales);
  }
  f->model->widest = max_int(f->model->widest, max_int(m.out, in));
  return m;
}

static Matrix read_matrix(File *f, const char *name, int out, int in) { return read_matrices(f, &name, &out, 1, in); }

// Heads of the byte level (level "stlm.") or of the trunk ("stlm.trunk_").
static Attention read_heads(File *f, const char *level) {
  Attention a = {0};
  char name[64];
#define NAMED(suffix) (snprintf(name, sizeof name, "%s%s", level, suffix), name)
  a.heads = read_int(f, NAMED("num_attention_heads"), 1, 1024);
  a.groups = read_int(f, NAMED("num_key_value_heads"), 1, a.heads);
  a.width = read_int(f, NAMED("head_dim"), 2, 1024);
  if (a.heads % a.groups || a.width % 2) fail(f, "%d heads of width %d for %d groups", a.heads, a.width, a.groups);
  f->model->widest_head = max_int(f->model->widest_head, a.width);
  set_prefix(f, "%s", level);
  a.periods = read_vector(f, "rotary_periods", a.width / 2);
  for (int i = 0; a.periods && i < a.width / 2; i++)
    if (!(a.periods[i] >= 1e-6f)) fail(f, "%srotary_periods has the item %g", level, (double)a.periods[i]);
  return a;
}

static Attention read_attention(File *f, Attention a, int in) {
  static const char *const names[] = {"q_proj.weight", "k_proj.weight", "v_proj.weight"};
  const int outs[] = {a.heads * a.width, a.groups * a.width, a.groups * a.width};
  a.qkv = read_matrices(f, names, outs, 3, in);
  a.out = read_matrix(f, "o_proj.weight", in, a.heads * a.width);
  a.q_norm = read_vector(f, "q_norm.weight", a.width);
  a.k_norm = read_vector(f, "k_norm.weight", a.width);
  return a;
}

static FeedForward read_feed_forward(File *f, int width, int inner) {
  FeedForward layer;
  layer.norm = read_vector(f, "feed_forward_norm.weight", width);
  layer.up = read_matrix(f, "feed_forward.up_proj.weight", inner, width);
  layer.down = read_matrix(f, "feed_forward.down_proj.weight", width, inner);
  return layer;
}

static void read_byte_layers(File *f, stlm_model *m) {
  const Attention heads = read_heads(f, "stlm.");
  const int inner = read_int(f, "stlm.intermediate_size", 1, 32768);
  int count;
  const int32_t *is_attention = read_ints(f, "stlm.byte_mixers", 1, m->num_byte_layers, m->num_byte_layers, &count);
  m->byte_layers = take(f, sizeof(ByteLayer) * (size_t)m->num_byte_layers);
  for (int i = 0; i < m->num_byte_layers && !*f->error; i++) {
    ByteLayer *layer = m->byte_layers + i;
    const char *part = i < m->num_encoder ? "model.local_encoder" : "model.local_decoder";
    const int index = i < m->num_encoder ? i : i - m->num_encoder;
    set_prefix(f, "%s.%d.", part, index);
    layer->norm = read_vector(f, "mixer_norm.weight", m->width);
    layer->feed_forward = read_feed_forward(f, m->width, inner);
    layer->is_attention = is_attention[i];
    layer->state = m->state_floats;
    set_prefix(f, "%s.%d.mixer.", part, index);
    if (layer->is_attention) {
      layer->attention = read_attention(f, heads, m->width);
      m->state_floats += ring_of_keys(m, &heads);
      m->state_floats += (size_t)round_up(m->window, LANES) * (size_t)(heads.groups * round_up(heads.width, LANES));
      continue;
    }
    layer->in_proj = read_matrix(f, "in_proj.weight", 3 * m->width, m->width);
    layer->out_proj = read_matrix(f, "out_proj.weight", m->width, m->width);
    const uint8_t *taps = find(f, "conv.weight", m->width, m->taps, NULL);  // (D, 1, N)
    layer->taps = take(f, sizeof(float) * (size_t)(m->width * m->taps));
    for (int at = 0; at < m->width * m->taps && !*f->error; at++)
      memcpy(layer->taps + at % m->taps * m->width + at / m->taps, taps + 4 * at, 4);
    m->state_floats += (size_t)((m->taps - 1) * m->width);
  }
}

static void read_trunk(File *f, stlm_model *m) {
  const Attention heads = read_heads(f, "stlm.trunk_");
  const int inner = read_int(f, "stlm.trunk_intermediate_size", 1, 32768);
  int num_attention = 0, num_feed_forward = 0, count;
  m->attention_of = read_ints(f, "stlm.trunk_attention_schedule", 1023, 1, 1024, &m->num_passes);
  const int has_window = seek(f, "stlm.trunk_window_patches", UINT32, 0, 1);  // files before version 3 need not have it
  m->trunk_window = has_window ? read_int(f, "stlm.trunk_window_patches", 0, MAX_BYTES) : 0;
  m->feed_forward_of = read_ints(f, "stlm.trunk_feed_forward_schedule", 1023, m->num_passes, m->num_passes, &count);
  for (int i = 0; i < m->num_passes && !*f->error; i++) {
    num_attention = max_int(num_attention, m->attention_of[i] + 1);
    num_feed_forward = max_int(num_feed_forward, m->feed_forward_of[i] + 1);
  }
  m->attention_blocks = take(f, sizeof(AttentionBlock) * (size_t)num_attention);
  m->feed_forward_blocks = take(f, sizeof(FeedForward) * (size_t)num_feed_forward);
  for (int i = 0; i < num_attention && !*f->error; i++) {
    set_prefix(f, "model.trunk.attention_blocks.%d.attention", i);
    m->attention_blocks[i].norm = read_vector(f, "_norm.weight", m->trunk_width);
    set_prefix(f, "model.trunk.attention_blocks.%d.attention.", i);
    m->attention_blocks[i].attention = read_attention(f, heads, m->trunk_width);
  }
  for (int i = 0; i < num_feed_forward && !*f->error; i++) {
    set_prefix(f, "model.trunk.feed_forward_blocks.%d.", i);
    m->feed_forward_blocks[i] = read_feed_forward(f, m->trunk_width, inner);
  }
}

static void read_embeddings(File *f, stlm_model *m) {
  const int64_t base = 65599, prime = 2147483647;
  const int word = read_int(f, "stlm.ngram_word_bytes", 0, MAX_CONTEXT);
  const int32_t *orders = read_ints(f, "stlm.ngram_orders", MAX_CONTEXT, 0, 15, &m->num_orders);
  for (int i = 0; i < m->num_orders; i++) m->orders[i] = orders[i];
  m->has_words = word > 0;
  if (word) m->orders[m->num_orders++] = word;
  m->ngram_rows = read_int(f, "stlm.ngram_rows", 1, 1 << 26);
  m->ngram_size = read_int(f, "stlm.ngram_embedding_size", 0, 2048);
  m->match_bytes = read_int(f, "stlm.match_bytes", 0, 6);
  const int doubles = seek(f, "stlm.match_doublings", UINT32, 0, 1);  // files of version 1 need not have it
  m->match_doublings = doubles ? read_int(f, "stlm.match_doublings", 0, MAX_DOUBLINGS) : 0;
  m->powers[0] = 1;
  for (int i = 1; i < MAX_CONTEXT; i++) m->powers[i] = m->powers[i - 1] * base % prime;
  set_prefix(f, "model.");
  m->embedding = read_table(f, "embed_tokens.weight", m->vocab, m->width);
  m->head = read_matrix(f, "embed_tokens.weight", m->vocab, m->width);
  if (m->num_orders) {
    const int width = m->ngram_size ? m->ngram_size : m->width;
    m->ngrams = read_table(f, "ngram_embedding.ngram_tables.weight", m->num_orders * m->ngram_rows, width);
    if (m->ngram_size) m->ngram_proj = read_matrix(f, "ngram_embedding.ngram_proj.weight", m->width, m->num_orders * width);
  }
  if (m->match_bytes) {
    m->match_following = read_table(f, "match_embedding.following.weight", 258, m->width);
    m->match_length = read_table(f, "match_embedding.length.weight", 7, m->width);
  }
  if (!seek(f, "stlm.context_ngram_orders", INT32_ARRAY, 0, MAX_LOOKUPS)) return;  // files before version 4 have none
  const int32_t *lookups = read_ints(f, "stlm.context_ngram_orders", INT32_MAX, 0, MAX_LOOKUPS, &m->num_lookups);
  for (int i = 0; i < m->num_lookups; i++) {
    m->lookups[i] = lookups[i];
    if (lookups[i] < 1 || lookups[i] > 6)
      fail(f, "stlm.context_ngram_orders has the item %d, expected 1 to 6", (int)lookups[i]);
  }
  m->lookup_places = read_int(f, "stlm.context_ngram_places", 1, 1024);
  m->lookup_following = read_table(f, "context_ngram_embedding.following.weight", 258 * m->num_lookups, m->width);
}

static void read_patching(File *f, stlm_model *m) {
  static const char *const rules[] = {"spacelike", "fixed", "vocabulary", "learned"};
  m->rule = (Rule)read_choice(f, "stlm.patching", rules, 4);
  m->cap_bytes = read_int(f, m->rule == FIXED ? "stlm.patch_bytes" : "stlm.max_patch_bytes", 1, 1 << 20);
  m->cap_characters = read_int(f, "stlm.max_patch_characters", 1, 1 << 20);
  if (m->rule == VOCABULARY) m->edges = read_ints(f, "stlm.patching_edges", INT32_MAX, 1, INT32_MAX / 256, &m->num_edges);
  set_prefix(f, "model.patcher.");
  if (m->rule == LEARNED) {
    m->router_q = read_matrix(f, "rule.q_proj.weight", m->width, m->width);
    m->router_k = read_matrix(f, "rule.k_proj.weight", m->width, m->width);
  }
  m->patch_proj = read_matrix(f, "patch_proj.weight", m->trunk_width, 2 * m->width);
  m->byte_proj = read_matrix(f, "byte_proj.weight", m->width, m->trunk_width);
  m->start = read_vector(f, "start.weight", m->width);
}

static void read_model(File *f, stlm_model *m) {
  static const char *const architectures[] = {"stlm"}, *const activations[] = {"relu2", "relu", "silu"};
  read_header(f);
  read_choice(f, "general.architecture", architectures, 1);
  const int version = read_int(f, "stlm.format_version", 0, INT32_MAX);
  if (version > FORMAT_VERSION)
    fail(f, "the file has version %d of the format, this engine knows up to %d: update the package", version, FORMAT_VERSION);
  verify(f);
  m->vocab = m->about.vocab_size = read_int(f, "stlm.vocab_size", 1, 65535);
  m->about.bos_id = read_int(f, "stlm.bos_token_id", 0, m->vocab - 1);
  m->about.ends = read_ints(f, "stlm.eos_token_ids", m->vocab - 1, 0, 64, &m->about.num_ends);
  m->about.source = read_string(f, "stlm.source");
  m->width = read_int(f, "stlm.hidden_size", 1, 8192);
  m->trunk_width = read_int(f, "stlm.trunk_hidden_size", 1, 8192);
  m->num_encoder = read_int(f, "stlm.num_local_encoder_layers", 1, 1024);
  m->num_byte_layers = m->num_encoder + read_int(f, "stlm.num_local_decoder_layers", 1, 1024);
  m->taps = read_int(f, "stlm.conv_kernel_size", 1, MAX_CONTEXT);
  m->window = read_int(f, "stlm.attention_window_bytes", 1, 4096);
  m->eps = seek(f, "stlm.norm_eps", FLOAT32, 1, 1) ? float_of((int32_t)(uint32_t)read_number(f, 4)) : 0;
  m->activation = (Activation)read_choice(f, "stlm.hidden_act", activations, 3);
  read_embeddings(f, m);
  read_byte_layers(f, m);
  read_trunk(f, m);
  read_patching(f, m);
  set_prefix(f, "model.");
  m->final_norm = read_vector(f, "final_norm.weight", m->width);
  m->trunk_norm = read_vector(f, "trunk.final_norm.weight", m->trunk_width);
  for (uint64_t i = 0; i < f->num_tensors; i++) {
    const Text name = f->tensors[i].name;
    if (!f->tensors[i].is_used)
      fail(f, "this engine does not know the tensor %.*s", name.length < 80 ? (int)name.length : 80, name.text);
  }
  m->widest = max_int(m->widest, 3 * m->width);
  m->item = m->patch_proj.type == Q8 || m->patch_proj.type == Q4 ? 2 : 4;
  m->open_sum = m->state_floats;
  m->visible = m->open_sum + (size_t)m->width;
  m->output = m->visible + (size_t)m->width;
  m->before = m->output + (size_t)m->width;
  m->state_floats = m->before + (size_t)m->width;
  m->about.snapshot_size = sizeof(stlm_snapshot) + sizeof(float) * m->state_floats;
}

stlm_model *stlm_load(const void *file, size_t size, const char *isa, char *error) {
  const Kernels *kernels = find_kernels(isa);
  stlm_model *model = calloc(1, sizeof *model);
  File f = {.bytes = file, .size = size, .error = error, .model = model};
  *error = 0;
  if (!model) snprintf(error, STLM_ERROR_SIZE, "not enough memory");
  else if (!kernels) fail(&f, "this CPU or this build has no '%.20s' instructions", isa);
  else read_model(&f, model);
  if (!*error) {
    model->kernels = kernels;
    model->about.isa = kernels->name;
    return model;
  }
  stlm_free(model);
  return NULL;
}

void stlm_free(stlm_model *model) {
  if (!model) return;
  for (Block *block = model->memory, *next; block; block = next) {
    next = block->next;
    free(block);
  }
  free(model);
}

int stlm_version(void) { return STLM_VERSION; }
const stlm_about *stlm_describe(const stlm_model *model) { return &model->about; }

// ---- Rows ----

static void clear_row(const stlm_model *m, Row *row) {
  row->at = (Position){0, 0, 0, 0};
  memset(row->state, 0, sizeof(float) * m->state_floats);
  memcpy(row->state + m->visible, m->start, sizeof(float) * (size_t)m->width);
}

stlm_batch *stlm_open(const stlm_model *m, int num_rows) {
  const size_t n = MAX_TOKENS, width = (size_t)m->width, widest = (size_t)m->widest;
  stlm_batch *b = calloc(1, sizeof *b);
  if (!b) return NULL;
  b->model = m;
  b->num_rows = num_rows;
  b->rows = calloc((size_t)num_rows, sizeof(Row));
  b->hidden = calloc(n * (3 * width + (size_t)m->trunk_width + 2 * widest + (size_t)m->widest_head) + widest, sizeof(float));
  b->quantized = malloc(n * (widest + 4));
  b->block_sums = malloc(sizeof(int32_t) * n * (widest / Q4_BLOCK + 1));
  b->chosen = malloc(sizeof(int32_t) * (size_t)m->vocab);
  b->is_chosen = malloc((size_t)m->vocab);
  int is_complete = b->rows && b->hidden && b->quantized && b->block_sums && b->chosen && b->is_chosen;
  for (int r = 0; r < num_rows && is_complete; r++) {
    Row *row = b->rows + r;
    row->state = malloc(sizeof(float) * m->state_floats);
    is_complete = row->state != NULL;
    if (is_complete) clear_row(m, row);
  }
  if (!is_complete) {
    stlm_close(b);
    return NULL;
  }
  b->before = b->hidden + n * width;
  b->new_patches = b->before + n * width;
  b->patches = b->new_patches + n * width;
  b->x = b->patches + n * (size_t)m->trunk_width;
  b->y = b->x + n * widest;
  b->cosines = b->y + n * widest;
  b->sines = b->cosines + n * (size_t)(m->widest_head / 2);
  b->part = b->sines + n * (size_t)(m->widest_head / 2);
  return b;
}

void stlm_close(stlm_batch *b) {
  if (!b) return;
  for (int r = 0; b->rows && r < b->num_rows; r++) {
    Row *row = b->rows + r;
    for (int i = 0; i < row->patch_room / PART; i++) free(row->pages[i]);
    free(row->pages), free(row->patch_ends), free(row->state);
    for (int i = 0; i <= MAX_DOUBLINGS; i++) free(row->matches[i].earlier), free(row->matches[i].slots);
    for (int i = 0; i < MAX_LOOKUPS; i++) free(row->lookups[i].earlier), free(row->lookups[i].slots);
    free(row->ids), free(row->digests);
  }
  free(b->rows), free(b->hidden), free(b->quantized), free(b->block_sums), free(b->scores);
  free(b->chosen), free(b->is_chosen), free(b);
}

int stlm_length(const stlm_batch *b, int row) { return b->rows[row].at.num_bytes; }

const int32_t *stlm_patches(const stlm_batch *b, int row, int *count) {
  *count = b->rows[row].at.num_patches;
  return b->rows[row].patch_ends;
}

const char *stlm_error(const stlm_batch *b) { return b->error; }

static int refuse(stlm_batch *b, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(b->error, sizeof b->error, format, arguments);
  va_end(arguments);
  return -1;
}

int stlm_refuse(stlm_batch *b, const char *sentence) { return refuse(b, "%s", sentence); }

int stlm_is_row_of(const stlm_batch *b, const stlm_model *m) { return b->model == m && b->num_rows == 1; }

// `*memory` with room for `count` items, those past `used` zeroed; 0 without memory.
static int resize(void *memory, size_t used, size_t count, size_t size) {
  char *larger, *old;
  memcpy(&old, memory, sizeof old);
  larger = count > SIZE_MAX / size ? NULL : realloc(old, count * size);
  if (!larger) return 0;
  memset(larger + used * size, 0, (count - used) * size);
  memcpy(memory, &larger, sizeof larger);
  return 1;
}

// At least two slots for every gram, `more` new ones included; 0 without memory.
static int reserve_grams(const Row *row, Index *index, int more, int n, int times) {
  size_t count = 256, needed = (size_t)(index->num_grams + more) * 2;
  if (needed <= (size_t)index->num_slots) return 1;
  while (count < needed) count *= 2;
  Slot *slots = calloc(count, sizeof *slots);
  if (!slots) return 0;
  free(index->slots);
  index->slots = slots;
  index->num_slots = (int)count;
  index->num_grams = 0;
  for (int t = 0; t < row->at.num_bytes; t++) enter_gram(row, index, t, n, times);
  return 1;
}

// Room for `more` bytes, at most MAX_TOKENS, which may all end patches.
static int reserve(stlm_batch *b, Row *row, int more) {
  const stlm_model *m = b->model;
  const Attention *a = &m->attention_blocks[0].attention;
  if (row->at.num_bytes > MAX_BYTES - more) return refuse(b, "a row is limited to %d bytes", MAX_BYTES);
  const int bytes = row->at.num_bytes + more, patches = row->at.num_patches + more;
  if (bytes > row->byte_room) {
    const size_t room = (size_t)bytes + (size_t)bytes / 4 + 64, used = (size_t)row->byte_room;
    if (!resize(&row->ids, used, room, sizeof *row->ids) || !resize(&row->digests, used, room, sizeof *row->digests))
      return refuse(b, "not enough memory for %d bytes", bytes);
    for (int i = 0; m->match_bytes && i <= m->match_doublings; i++)
      if (!resize(&row->matches[i].earlier, used, room, sizeof *row->matches[i].earlier))
        return refuse(b, "not enough memory for %d bytes", bytes);
    for (int i = 0; i < m->num_lookups; i++)
      if (!resize(&row->lookups[i].earlier, used, room, sizeof *row->lookups[i].earlier))
        return refuse(b, "not enough memory for %d bytes", bytes);
    row->byte_room = (int)room;
  }
  if (patches > row->patch_room) {
    const size_t used = (size_t)row->patch_room, room = (size_t)round_up(patches + patches / 8, PART);
    if (!resize(&row->patch_ends, used, room, sizeof *row->patch_ends) ||
        !resize(&row->pages, used / PART, room / PART, sizeof *row->pages))
      return refuse(b, "not enough memory for %d patches", patches);
    row->patch_room = (int)room;
  }
  char **page = row->pages + (patches - 1) / PART;  // the only one that may be missing
  if (!*page && !(*page = calloc((size_t)m->num_passes, keys_of_pass(m) + values_of_pass(m))))
    return refuse(b, "not enough memory for %d patches", patches);
  const int scores = max_int(row->patch_room, round_up(m->window, LANES));
  if (scores > b->score_room) {
    int queries = a->heads / a->groups;
    for (int i = 0; i < m->num_byte_layers; i++)
      if (m->byte_layers[i].is_attention) queries = max_int(queries, m->byte_layers[i].attention.heads);
    if (!resize(&b->scores, 0, (size_t)scores, sizeof(float) * (size_t)queries))
      return refuse(b, "not enough memory for scores");
    b->score_room = scores;
  }
  for (int i = 0; m->match_bytes && i <= m->match_doublings; i++)
    if (!reserve_grams(row, row->matches + i, more, m->match_bytes, 1 << i))
      return refuse(b, "not enough memory for %d bytes", bytes);
  for (int i = 0; i < m->num_lookups; i++)
    if (!reserve_grams(row, row->lookups + i, more, m->lookups[i], 1))
      return refuse(b, "not enough memory for %d bytes", bytes);
  return 0;
}

// Log probabilities of b->id_of among n rows of logits.
static void log_softmax(const stlm_batch *b, int n, const float *logits, float *to) {
  const int vocab = b->model->vocab;
  for (int i = 0; i < n; i++, logits += vocab) {
    float largest = logits[0];
    double sum = 0;
    for (int v = 1; v < vocab; v++) largest = logits[v] > largest ? logits[v] : largest;
    for (int v = 0; v < vocab; v++) sum += (double)exp_of(logits[v] - largest);
    to[i] = (float)((double)(logits[b->id_of[i]] - largest) - log(sum));
  }
}

// Reads the n tokens whose row_of and id_of are set.
static int advance(stlm_batch *b, int n, float *log_probabilities, float *logits) {
  const stlm_model *m = b->model;
  const size_t size = sizeof(float) * (size_t)m->width;
  for (int i = 0; i < n;) {
    int first = i;
    while (i < n && b->row_of[i] == b->row_of[first]) i++;
    if (reserve(b, b->rows + b->row_of[first], i - first)) return -1;
    memcpy(b->before + first * m->width, b->rows[b->row_of[first]].state + m->output, size);
  }
  m->kernels->forward(b, n);
  if (log_probabilities || logits) {
    for (int i = 1; i < n; i++)
      if (b->row_of[i] == b->row_of[i - 1]) memcpy(b->before + i * m->width, b->hidden + (i - 1) * m->width, size);
    m->kernels->product(b, &m->head, b->before, n, logits ? logits : b->y);
    if (log_probabilities) log_softmax(b, n, b->y, log_probabilities);
  }
  return 0;
}

static int read_rows(stlm_batch *b, const int32_t *counts, const int32_t *ids, float *log_probabilities, float *logits) {
  const int32_t *next = ids;
  for (int r = 0; r < b->num_rows; r++) {
    if (counts[r] < 0) return refuse(b, "row %d reads %d bytes", r, (int)counts[r]);
    if ((log_probabilities || logits) && counts[r] && !b->rows[r].at.num_bytes)
      return refuse(b, "row %d is empty: there is nothing to predict its first id from", r);
    for (int i = 0; i < counts[r]; i++, next++)
      if (*next < 0 || *next >= b->model->vocab)
        return refuse(b, "id %d of row %d is %d, expected 0 to %d", i, r, (int)*next, b->model->vocab - 1);
  }
  int n = 0;
  for (int r = 0; r < b->num_rows; r++) {
    for (int i = 0; i < counts[r]; i++) {
      b->row_of[n] = r;
      b->id_of[n++] = *ids++;
      if (n < MAX_TOKENS) continue;
      if (advance(b, n, log_probabilities, logits)) return -1;
      if (log_probabilities) log_probabilities += n;
      if (logits) logits += (size_t)n * (size_t)b->model->vocab;
      n = 0;
    }
  }
  return n ? advance(b, n, log_probabilities, logits) : 0;
}

int stlm_read(stlm_batch *b, const int32_t *counts, const int32_t *ids) { return read_rows(b, counts, ids, NULL, NULL); }

int stlm_score(stlm_batch *b, const int32_t *counts, const int32_t *ids, float *log_probabilities) {
  return read_rows(b, counts, ids, log_probabilities, NULL);
}

int stlm_read_logits(stlm_batch *b, const int32_t *counts, const int32_t *ids, float *logits) {
  return read_rows(b, counts, ids, NULL, logits);
}

// Logits of up to MAX_TOKENS rows from `first` on that are active, or all.
static int logits_of(stlm_batch *b, int first, const uint8_t *active, float *logits) {
  const stlm_model *m = b->model;
  int n = 0;
  for (int r = first; r < b->num_rows && n < MAX_TOKENS; r++) {
    if (active && !active[r]) continue;
    if (!b->rows[r].at.num_bytes) return refuse(b, "row %d is empty: there is nothing to predict its first id from", r);
    memcpy(b->before + n * m->width, b->rows[r].state + m->output, sizeof(float) * (size_t)m->width);
    b->row_of[n++] = r;
  }
  m->kernels->product(b, &m->head, b->before, n, logits);
  return n;
}

int stlm_logits(stlm_batch *b, float *logits) {
  for (int r = 0; r < b->num_rows; r += MAX_TOKENS)
    if (logits_of(b, r, NULL, logits + (size_t)r * (size_t)b->model->vocab) < 0) return -1;
  return 0;
}

// ---- Sampling ----

static uint64_t mix(uint64_t z) {  // splitmix64
  z = (z + 0x9E3779B97F4A7C15u);
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

// The next id of a row, as `generate` chooses it: repetition penalty, temperature, top-k, top-p, min-p. Changes `logits`.
static int pick(stlm_batch *b, const Row *row, const stlm_sampling *s, uint64_t seed, float *logits) {
  const int vocab = b->model->vocab;
  if (s->repetition_penalty != 1.0f) {
    memset(b->is_chosen, 0, (size_t)vocab);
    for (int t = 0; t < row->at.num_bytes; t++) b->is_chosen[row->ids[t]] = 1;
    for (int v = 0; v < vocab; v++)
      if (b->is_chosen[v]) logits[v] = logits[v] < 0 ? logits[v] * s->repetition_penalty : logits[v] / s->repetition_penalty;
  }
  int best = 0;
  for (int v = 1; v < vocab; v++) best = logits[v] > logits[best] ? v : best;
  if (s->temperature == 0.0f) return best;

  float largest = logits[best], total = 0.0f, kept = 0.0f;
  float *weights = logits;
  for (int v = 0; v < vocab; v++) weights[v] = exp_of((logits[v] - largest) / s->temperature);
  for (int v = 0; v < vocab; v++) total += weights[v];
  int num_chosen = vocab;
  if ((s->top_k > 0 && s->top_k < vocab) || s->top_p < 1.0f || s->min_p > 0.0f) {
    // The likeliest first, until there are enough of them.
    const int most = s->top_k > 0 && s->top_k < vocab ? s->top_k : vocab;
    memset(b->is_chosen, 0, (size_t)vocab);
    for (num_chosen = 0; num_chosen < most; num_chosen++) {
      if (most == vocab && kept >= s->top_p * total) break;
      int next = -1;
      for (int v = 0; v < vocab; v++)
        if (!b->is_chosen[v] && (next < 0 || weights[v] > weights[next])) next = v;
      if (num_chosen && most == vocab && weights[next] < s->min_p) break;
      b->is_chosen[next] = 1;
      b->chosen[num_chosen] = next;
      kept += weights[next];
    }
    if (most < vocab && s->top_p < 1.0f) {  // of those that top-k left
      float enough = s->top_p * kept;
      int count = 0;
      for (kept = 0.0f; count < num_chosen && (!count || kept < enough); count++) kept += weights[b->chosen[count]];
      num_chosen = count;
    }
    // After top-p, whose share is one of what min-p leaves out, too.
    for (; num_chosen > 1 && weights[b->chosen[num_chosen - 1]] < s->min_p; num_chosen--) kept -= weights[b->chosen[num_chosen - 1]];
  } else {
    for (int v = 0; v < vocab; v++) b->chosen[v] = v;
    kept = total;
  }
  float draw = (float)(mix(mix(seed) + (uint64_t)row->at.num_bytes) >> 40) * 5.9604644775390625e-8f * kept;
  for (int i = 0; i < num_chosen; i++) {
    draw -= weights[b->chosen[i]];
    if (draw < 0.0f) return b->chosen[i];
  }
  return best;  // by rounding, or if there are no numbers
}

int stlm_write(stlm_batch *b, const stlm_sampling *s, const uint64_t *seeds, uint8_t *active, int count, int32_t *ids) {
  for (size_t i = 0; i < (size_t)b->num_rows * (size_t)count; i++) ids[i] = -1;
  for (int i = 0; i < count; i++) {
    for (int first = 0; first < b->num_rows;) {
      int n = logits_of(b, first, active, b->y), num_going_on = 0;
      if (n < 0) return -1;
      const int last = n < MAX_TOKENS ? b->num_rows : b->row_of[n - 1];
      for (int j = 0; j < n; j++) {
        const int r = b->row_of[j];
        const int id = pick(b, b->rows + r, s + r, seeds[r], b->y + j * b->model->vocab);
        ids[(size_t)r * (size_t)count + (size_t)i] = id;
        for (int e = 0; e < s[r].num_ends; e++) active[r] &= id != s[r].ends[e];
        if (!active[r]) continue;
        b->row_of[num_going_on] = r;
        b->id_of[num_going_on++] = id;
      }
      first = last + 1;
      if (num_going_on && advance(b, num_going_on, NULL, NULL)) return -1;
    }
  }
  return 0;
}

// ---- Snapshots ----

static uint64_t digest_of(const Row *row, int bytes) { return bytes ? row->digests[bytes - 1] : 0; }

stlm_snapshot *stlm_take(const stlm_batch *b, int r) {
  const Row *row = b->rows + r;
  const size_t size = sizeof(float) * b->model->state_floats;
  stlm_snapshot *snapshot = malloc(sizeof *snapshot + size);
  if (!snapshot) return NULL;
  snapshot->model = b->model;
  snapshot->at = row->at;
  snapshot->digest = digest_of(row, row->at.num_bytes);
  memcpy(snapshot->state, row->state, size);
  return snapshot;
}

int stlm_rewind(stlm_batch *b, int r, const stlm_snapshot *snapshot) {
  Row *row = b->rows + r;
  const int bytes = snapshot->at.num_bytes;
  if (snapshot->model != b->model || bytes > row->at.num_bytes || digest_of(row, bytes) != snapshot->digest)
    return refuse(b, "row %d does not begin with the %d bytes of the snapshot", r, bytes);
  const stlm_model *m = b->model;
  for (int t = row->at.num_bytes - 1; t >= bytes; t--) {
    for (int i = 0; m->match_bytes && i <= m->match_doublings; i++)
      leave_gram(row, row->matches + i, t, m->match_bytes, 1 << i);
    for (int i = 0; i < m->num_lookups; i++) leave_gram(row, row->lookups + i, t, m->lookups[i], 1);
  }
  row->at = snapshot->at;  // keys and values of later patches are overwritten before they are read
  memcpy(row->state, snapshot->state, sizeof(float) * b->model->state_floats);
  return 0;
}

void stlm_drop(stlm_snapshot *snapshot) { free(snapshot); }
