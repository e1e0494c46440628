// SPDX-License-Identifier: Apache-2.0
// Lossless compression: bytes in an arithmetic code with the probabilities that a model gives them.
//
// A decoder must find the probabilities of the encoder to the last bit. The engine gives both the same logits, in pieces of a
// text as byte by byte and with any instructions; from there to the code there are two operations on floats, a difference and
// a product, which IEEE 754 rounds in one way (no product of the two can be fused), and then integers only.
//
// The model sees a kilobyte. Over longer distances a match model, as all strong compressors have one, knows which byte followed
// the last occurrence of the same bytes, and corrects the odds that the model gives it by how often such bytes came so far.
#include "stlm.h"

#include <float.h>
#include <stdlib.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0
#error "floats are kept with more digits than they have: compile for SSE2 (-msse2 -mfpmath=sse)"
#endif

#ifndef WINDOW_BITS
#define WINDOW_BITS 22
#endif

enum { BYTES = 256, PIECE = 64, LAST = 2, STORED = 1, NUM_KINDS = 4 };
enum { WINDOW = 1 << WINDOW_BITS, SLOTS = 1 << 18, SHORTEST = 6, LONG = 16, LONGEST = 32 };
enum { LENGTHS = 5, OCTAVES = 24, MOST = 1 << 26 };

typedef struct { uint64_t start, size, total; } Interval;  // of a byte among the weights of all

// How often the bytes of matches came and did not, and how often they should have by the model, in units of 2**-16.
typedef struct { uint32_t hits, misses, expected_hits, expected_misses; } Count;
typedef Count Counts[LENGTHS][OCTAVES];  // by the length of the match and the odds that the model gives its byte

// The content so far, and where the bytes at its end were before.
typedef struct {
  uint8_t bytes[WINDOW];  // byte t at t % WINDOW
  uint64_t size;
  uint64_t slots[SLOTS];  // by the hash of SHORTEST bytes: the size after their last occurrence
  uint64_t next;  // where the byte is that followed a match
  int length;  // of the match, up to LONGEST; 0 for none
  Counts counts;
} History;

// Numbers from `low` to `low + range` begin with what was coded so far.
typedef struct {
  uint64_t low, range;
  uint8_t *to;  // where bytes of the code go, NULL to count them only
  size_t at;  // how many there are
} Range;

struct stlm_coder {
  const stlm_model *model;
  Range range;
  uint32_t kinds[NUM_KINDS];  // how often there was each kind of segment, and once more
  const uint8_t *code;  // of a decoder
  size_t code_size;
  uint64_t number;  // the next 8 bytes of it
  History history;
  Interval intervals[STLM_SEGMENT];
  int vocab, has_ended;
  float *logits;  // (PIECE, V)
};

// ---- Probabilities ----

// Weights of the 256 bytes by the model, in units of 2**-22 of the largest, and at least 1; returns their sum.
static uint64_t weigh(const float *logits, uint64_t *weights) {
  float largest = logits[0];
  uint64_t total = 0;
  for (int v = 1; v < BYTES; v++) largest = logits[v] > largest ? logits[v] : largest;
  for (int v = 0; v < BYTES; v++) {
    const float halvings = (largest - logits[v]) * 94548.46f;  // log2(e), in units of 2**-16
    weights[v] = 1;
    if (halvings < 22.0f * 65536.0f) {  // not if it is no number
      // 2**-f by the parabola through its values at 0, 1/2 and 1: within 0.4%.
      const uint32_t whole = (uint32_t)halvings >> 16, f = (uint32_t)halvings & 65535;
      weights[v] += ((1u << 22) - ((uint64_t)f * (2816781u - ((uint64_t)f * 719629u >> 16)) >> 16)) >> whole;
    }
    total += weights[v];
  }
  return total;
}

static void append(History *h, uint8_t byte) {
  const int is_hit = h->length && h->bytes[h->next++ % WINDOW] == byte;
  if (is_hit) h->length += h->length < LONGEST;
  else h->length = h->length >= LONG;  // a long match may go on after a byte that differs
  h->bytes[h->size++ % WINDOW] = byte;
  if (h->size < SHORTEST) return;
  uint64_t hash = 0;
  for (uint64_t i = 1; i <= SHORTEST; i++) hash = (hash + h->bytes[(h->size - i) % WINDOW] + 1) * 0x9E3779B97F4A7C15u;
  uint64_t *slot = h->slots + (hash >> 40) % SLOTS, before = *slot;
  *slot = h->size;
  if (h->length >= SHORTEST || h->size - before >= WINDOW - LONGEST) return;
  uint64_t length = 0;
  while (length < LONGEST && length < before &&
         h->bytes[(before - 1 - length) % WINDOW] == h->bytes[(h->size - 1 - length) % WINDOW])
    length++;
  if (length < SHORTEST) return;
  h->length = (int)length;
  h->next = before;
}

// In units of 2**-8, up to 2**12.
static uint64_t ratio_of(uint64_t a, uint64_t b) {
  const uint64_t ratio = (a << 8) / b;
  return ratio < 1 << 20 ? ratio : 1 << 20;
}

// Corrects the weight of the byte of the match, if there is one, and its share in `total`. Returns where to count what comes,
// and in `expected` the probability that the model gave the byte, in units of 2**-16.
static Count *weigh_match(History *h, uint64_t *weights, uint64_t *total, uint32_t *expected) {
  if (!h->length) return NULL;
  uint64_t *weight = weights + h->bytes[h->next % WINDOW], rest = *total - *weight, scaled = *weight;
  int octave = OCTAVES / 2;
  for (; scaled < rest && octave > 0; octave--) scaled *= 2;
  for (; scaled >= 2 * rest && octave < OCTAVES - 1; octave++) rest *= 2;
  const int kind = (h->length >= SHORTEST) + (h->length >= 8) + (h->length >= 12) + (h->length >= LONGEST);
  Count *c = &h->counts[kind][octave];
  *expected = (uint32_t)((*weight << 16) / *total);
  *total -= *weight;
  *weight = *weight * ratio_of(c->hits, c->expected_hits) * ratio_of(c->expected_misses, c->misses) >> 16;
  if (*weight < 1) *weight = 1;
  if (*weight > (uint64_t)1 << 34) *weight = (uint64_t)1 << 34;
  *total += *weight;
  return c;
}

static void count(Count *c, int is_hit, uint32_t expected) {
  if (!c) return;
  c->hits += is_hit ? 65536 : 0;
  c->misses += is_hit ? 0 : 65536;
  c->expected_hits += expected;
  c->expected_misses += 65536 - expected;
  if (c->hits < MOST && c->misses < MOST) return;
  uint32_t *numbers[] = {&c->hits, &c->misses, &c->expected_hits, &c->expected_misses};
  for (int i = 0; i < 4; i++) *numbers[i] = *numbers[i] / 2 + 32;  // never less than 64
}

static Interval interval_of(const uint64_t *weights, uint64_t total, int byte) {
  Interval interval = {0, weights[byte], total};
  for (int v = 0; v < byte; v++) interval.start += weights[v];
  return interval;
}

// ---- The code: a range coder without carries (D. Subbotin, 1999), with 64 bits ----

enum { TOP_SHIFT = 56 };
static const uint64_t TOP = (uint64_t)1 << TOP_SHIFT, BOTTOM = (uint64_t)1 << 44;

static void put(Range *r, uint64_t byte) {
  if (r->to) r->to[r->at] = (uint8_t)byte;
  r->at++;
}

// The part `interval` of the range. Puts the bytes that all of its numbers begin with; returns how many there are, up to 8.
static int narrow(Range *r, Interval interval) {
  int shifts = 0;
  r->range /= interval.total;
  r->low += r->range * interval.start;
  r->range *= interval.size;
  for (;; shifts++) {
    if ((r->low ^ (r->low + r->range)) >= TOP) {
      if (r->range >= BOTTOM) return shifts;
      r->range = -r->low & (BOTTOM - 1);  // up to the next multiple: the numbers then begin with the same byte
    }
    put(r, r->low >> TOP_SHIFT);
    r->low <<= 8;
    r->range <<= 8;
  }
}

// The fewest bytes that tell a number of the range.
static void finish(Range *r) {
  for (int count = 1; count <= 8; count++) {
    const uint64_t number = (r->low + r->range - 1) & (UINT64_MAX << (64 - 8 * count));
    if (number < r->low) continue;
    for (int i = 0; i < count; i++) put(r, number >> (TOP_SHIFT - 8 * i) & 255);
    return;
  }
}

static uint64_t next_byte(stlm_coder *c) { return c->range.at++ < c->code_size ? c->code[c->range.at - 1] : 0; }

// The place among `total` that comes next; the caller narrows the range to the interval in which it lies.
static uint64_t place_of(const stlm_coder *c, uint64_t total) {
  const uint64_t place = (c->number - c->range.low) / (c->range.range / total);
  return place < total ? place : total - 1;
}

static void take(stlm_coder *c, Interval interval) {
  Range *r = &c->range;
  const size_t at = r->at;
  const int shifts = narrow(r, interval);
  r->at = at;  // which counts the bytes of the code here
  for (int i = 0; i < shifts; i++) c->number = c->number << 8 | next_byte(c);
}

static uint64_t take_uniform(stlm_coder *c, uint64_t total) {
  const uint64_t place = place_of(c, total);
  take(c, (Interval){place, 1, total});
  return place;
}

// ---- Segments: by the model or stored, with a length if it is the last ----

static Interval kind_interval(const stlm_coder *c, int kind) {
  Interval interval = {0, c->kinds[kind], 0};
  for (int k = 0; k < NUM_KINDS; k++) {
    if (k < kind) interval.start += c->kinds[k];
    interval.total += c->kinds[k];
  }
  return interval;
}

static stlm_coder *open_coder(const stlm_model *model) {
  stlm_coder *c = calloc(1, sizeof *c);
  float *logits = malloc(sizeof(float) * PIECE * (size_t)stlm_describe(model)->vocab_size);
  if (!c || !logits || stlm_describe(model)->vocab_size < BYTES) {
    free(c), free(logits);
    return NULL;
  }
  c->model = model;
  c->vocab = stlm_describe(model)->vocab_size;
  c->logits = logits;
  c->range.range = UINT64_MAX;
  for (int k = 0; k < NUM_KINDS; k++) c->kinds[k] = 1;
  for (int i = 0; i < LENGTHS * OCTAVES; i++)
    c->history.counts[i / OCTAVES][i % OCTAVES] = (Count){1 << 14, 1 << 14, 1 << 14, 1 << 14};
  return c;
}

stlm_coder *stlm_encoder(const stlm_model *model) { return open_coder(model); }

stlm_coder *stlm_decoder(const stlm_model *model, const void *code, size_t size) {
  stlm_coder *c = open_coder(model);
  if (!c) return NULL;
  c->code = code;
  c->code_size = size;
  for (int i = 0; i < 8; i++) c->number = c->number << 8 | next_byte(c);
  return c;
}

void stlm_coder_close(stlm_coder *c) {
  if (c) free(c->logits);
  free(c);
}

static int check(const stlm_coder *c, stlm_batch *b, int size) {
  if (!stlm_is_row_of(b, c->model)) return stlm_refuse(b, "a coder takes one row of its model");
  if (size < 0 || size > STLM_SEGMENT) return stlm_refuse(b, "a segment has 0 to 512 bytes");
  return c->has_ended ? stlm_refuse(b, "the code has ended: a segment of less than 512 bytes is the last") : 0;
}

int stlm_encode(stlm_coder *c, stlm_batch *b, const uint8_t *bytes, int size, uint8_t *to) {
  if (check(c, b, size)) return -1;
  const int is_last = size < STLM_SEGMENT;
  Counts counts;
  memcpy(counts, c->history.counts, sizeof counts);
  for (int first = 0; first < size; first += PIECE) {
    const int32_t n = size - first < PIECE ? size - first : PIECE;
    uint64_t weights[BYTES];
    int32_t ids[PIECE];
    for (int i = 0; i < n; i++) ids[i] = bytes[first + i];
    if (stlm_read_logits(b, &n, ids, c->logits)) return -1;
    for (int i = 0; i < n; i++) {
      uint64_t total = weigh(c->logits + i * c->vocab, weights);
      uint32_t expected = 0;
      Count *match = weigh_match(&c->history, weights, &total, &expected);
      c->intervals[first + i] = interval_of(weights, total, ids[i]);
      count(match, c->history.bytes[c->history.next % WINDOW] == ids[i], expected);
      append(&c->history, bytes[first + i]);
    }
  }
  Range trial = c->range;
  trial.to = NULL;
  trial.at = 0;
  for (int i = 0; i < size; i++) narrow(&trial, c->intervals[i]);
  const int is_stored = trial.at > (size_t)size, kind = is_last * LAST + is_stored * STORED;
  c->range.to = to;
  c->range.at = 0;
  narrow(&c->range, kind_interval(c, kind));
  c->kinds[kind]++;
  if (is_last) narrow(&c->range, (Interval){(uint64_t)size, 1, STLM_SEGMENT});
  if (is_stored) memcpy(c->history.counts, counts, sizeof counts);  // a decoder has no expectations of what is stored
  for (int i = 0; i < size; i++) narrow(&c->range, is_stored ? (Interval){bytes[i], 1, BYTES} : c->intervals[i]);
  if (is_last) finish(&c->range);
  c->has_ended = is_last;
  return (int)c->range.at;
}

int stlm_decode(stlm_coder *c, stlm_batch *b, uint8_t *to) {
  if (check(c, b, 0)) return -1;
  int kind = 0;
  for (uint64_t place = place_of(c, kind_interval(c, 0).total); kind < NUM_KINDS - 1; kind++) {
    const Interval interval = kind_interval(c, kind);
    if (place < interval.start + interval.size) break;
  }
  take(c, kind_interval(c, kind));
  c->kinds[kind]++;
  const int size = kind & LAST ? (int)take_uniform(c, STLM_SEGMENT) : STLM_SEGMENT;
  for (int i = 0; i < size; i++) {
    if (c->range.at > c->code_size + 8) return -2;
    if (kind & STORED) {
      to[i] = (uint8_t)take_uniform(c, BYTES);
      append(&c->history, to[i]);
      continue;
    }
    uint64_t weights[BYTES];
    uint32_t expected = 0;
    if (stlm_logits(b, c->logits)) return -1;
    Interval interval = {0, 0, weigh(c->logits, weights)};
    Count *match = weigh_match(&c->history, weights, &interval.total, &expected);
    int32_t byte = 0, one = 1;
    for (uint64_t place = place_of(c, interval.total); place >= interval.start + weights[byte]; byte++)
      interval.start += weights[byte];
    interval.size = weights[byte];
    take(c, interval);
    to[i] = (uint8_t)byte;
    count(match, c->history.bytes[c->history.next % WINDOW] == byte, expected);
    append(&c->history, to[i]);
    if (stlm_read(b, &one, &byte)) return -1;
  }
  c->has_ended = size < STLM_SEGMENT;
  return size;
}
