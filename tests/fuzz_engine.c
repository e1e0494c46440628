// SPDX-License-Identifier: Apache-2.0
// Mutated files and random calls for a build with sanitizers:
//
//   gcc -g -O1 -std=c99 -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -Wno-psabi
//       -I modeling_stlm/inference tests/fuzz_engine.c modeling_stlm/inference/stlm.c modeling_stlm/inference/zip.c -lm -o fuzz
//   ./fuzz COUNT SEED model.gguf ...
//
// With -DWINDOW_BITS=9 the window of zip.c wraps within the contents that are tried. With -DUSE_ONE_IN=20 only so many of the
// files that were loaded are used, which takes most of the time.
//
// Prints how many files were tried and how many of them were loaded. Most mutations get a checksum that fits.
#include "stlm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef USE_ONE_IN
#define USE_ONE_IN 1
#endif

static uint64_t state;

static uint32_t draw(uint32_t below) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return below ? (uint32_t)(state >> 33) % below : 0;
}

static void set_checksum(uint8_t *data, size_t size, size_t at) {
  uint32_t a = 1, b = 0;
  if (at + 4 > size) return;
  memset(data + at, 0, 4);
  for (size_t i = 0; i < size; i++) {
    a = (a + data[i]) % 65521;
    b = (b + a) % 65521;
  }
  for (int i = 0; i < 4; i++) data[at + (size_t)i] = (uint8_t)((b << 16 | a) >> (8 * i));
}

static void mutate(uint8_t *data, size_t *size, size_t header) {
  static const uint32_t special[] = {0,          1,           255,         256,        65535,     65536,
                                     0x7fffffff, 0x80000000u, 0xffffffffu, 0x7f800000, 0x7fc00000};
  for (uint32_t left = 1 + draw(4); left; left--) {
    uint32_t reach = (uint32_t)(draw(4) ? header : *size), at = draw(reach < 8 ? 8 : reach - 8);
    if (draw(40) == 0) *size = draw((uint32_t)*size) + 1;
    if (at + 8 > *size) continue;
    if (draw(3) == 0) data[at] ^= (uint8_t)(1 << draw(8));
    else if (draw(2)) data[at] = (uint8_t)draw(256);
    else memcpy(data + at, special + draw(sizeof special / sizeof *special), 4);
  }
}

// Random calls, most of which are sensible.
static void use(const stlm_model *model) {
  const int num_rows = 1 + (int)draw(5), vocab = stlm_describe(model)->vocab_size;
  stlm_batch *batch = stlm_open(model, num_rows);
  stlm_snapshot *snapshot = NULL;
  float *floats = malloc(sizeof(float) * (size_t)(num_rows * (vocab > 512 ? vocab : 512)));
  int32_t ids[5 * 64], counts[5], ends[2] = {10, 258};
  uint64_t seeds[5] = {1, 2, 3, 4, 5};
  if (!batch || !floats) exit(2);
  for (int call = 0; call < 6; call++) {
    const int row = (int)draw((uint32_t)num_rows);
    int num_patches = 0;
    const int32_t *patch_ends = stlm_patches(batch, row, &num_patches);
    for (int i = 0; i < num_patches; i++)
      if (patch_ends[i] <= (i ? patch_ends[i - 1] : 0) || patch_ends[i] > stlm_length(batch, row)) exit(6);
    uint8_t active[5];
    for (int r = 0; r < num_rows; r++) {
      counts[r] = (int32_t)draw(64);
      active[r] = stlm_length(batch, r) > 0 && draw(4);
    }
    for (int i = 0; i < 5 * 64; i++) ids[i] = (int32_t)(draw(3) ? "ab \nz\xe4\xb8\xad"[draw(8)] & 255 : draw(260));
    if (draw(20) == 0) ids[draw(64)] = (int32_t)draw(0xffffffffu);
    stlm_sampling sampling = {draw(2) ? 0.0f : 0.7f, draw(2) ? 1.0f : 0.8f, draw(2) ? 0.0f : 0.1f, draw(2) ? 1.0f : 1.3f,
                              (int32_t)draw(8), 2, ends};
    switch (draw(5)) {
      case 0: stlm_logits(batch, floats); break;
      case 1: stlm_score(batch, counts, ids, floats); break;
      case 2: {
        const stlm_sampling greedy = {0.0f, 1.0f, 0.0f, 1.0f, 0, 2, ends};
        const stlm_sampling samplings[5] = {sampling, greedy, sampling, greedy, sampling};
        stlm_write(batch, samplings, seeds, active, 1 + (int)draw(20), ids);
        break;
      }
      case 3:
        if (snapshot && draw(2)) stlm_rewind(batch, 0, snapshot);
        stlm_drop(snapshot);
        snapshot = stlm_take(batch, 0);
        break;
      default: stlm_read(batch, counts, ids);
    }
  }
  stlm_drop(snapshot);
  stlm_close(batch);
  free(floats);
}

// A row that has read the token that begins documents and `size` bytes.
static stlm_batch *row_after(const stlm_model *model, const uint8_t *bytes, int size) {
  const int bos = 257, count = size + 1;
  int32_t ids[1 + 2 * STLM_SEGMENT] = {bos < stlm_describe(model)->vocab_size ? bos : 0};
  stlm_batch *row = stlm_open(model, 1);
  if (!row) exit(2);
  for (int i = 0; i < size; i++) ids[i + 1] = bytes[i];
  stlm_read(row, &count, ids);  // may fail, and then also what is done with the row
  return row;
}

// What is coded must come back, whatever the model says; code that was changed, or another text, may.
static void code(const stlm_model *model) {
  uint8_t bytes[2 * STLM_SEGMENT + 1], code[3 * 16 * STLM_SEGMENT], decoded[3 * STLM_SEGMENT];
  const int count = (int)draw(draw(3) ? 100 : 2 * STLM_SEGMENT + 1);
  for (int i = 0; i < count; i++) bytes[i] = (uint8_t)(draw(4) ? "ab \n"[draw(4)] : (int)draw(256));
  stlm_batch *many = stlm_open(model, 70);
  if (!many) exit(2);
  for (int is_changed = 0; is_changed < 2; is_changed++) {
    stlm_coder *encoder = stlm_encoder(model), *decoder = NULL;
    int size = 0, length = STLM_SEGMENT, added = 0;
    for (int at = 0; encoder && added >= 0 && length == STLM_SEGMENT; at += length) {
      stlm_batch *row = row_after(model, bytes, at);
      length = count - at < STLM_SEGMENT ? count - at : STLM_SEGMENT;
      if (stlm_encode(encoder, many, bytes, 1, code) != -1) exit(5);
      if (stlm_encode(encoder, row, bytes, STLM_SEGMENT + 1, code) != -1) exit(5);
      added = stlm_encode(encoder, row, bytes + at, length, code + size);
      size += added;
      if (length < STLM_SEGMENT && added >= 0 && stlm_encode(encoder, row, bytes, 0, code) != -1) exit(5);
      stlm_close(row);
    }
    if (is_changed && added > 0) code[draw((uint32_t)size)] ^= (uint8_t)(1 << draw(8));
    if (added > 0) decoder = stlm_decoder(model, code, (size_t)size);
    length = STLM_SEGMENT;
    for (int at = 0; decoder && length == STLM_SEGMENT && at <= 2 * STLM_SEGMENT; at += length) {
      stlm_batch *row = row_after(model, decoded, at);
      if (stlm_decode(decoder, many, decoded) != -1) exit(5);
      length = stlm_decode(decoder, row, decoded + at);
      if (!is_changed && (length < 0 || at + length > count || memcmp(bytes + at, decoded + at, (size_t)length))) exit(4);
      if (!is_changed && length < STLM_SEGMENT && at + length != count) exit(4);
      if (length >= 0 && length < STLM_SEGMENT && stlm_decode(decoder, row, decoded) != -1) exit(5);
      stlm_close(row);
    }
    stlm_coder_close(encoder), stlm_coder_close(decoder);
  }
  stlm_close(many);
}

int main(int count, char **arguments) {
  static const char *const isas[] = {"", "scalar", "simd128", "avx2", "avx512"};
  const long tries = count > 3 ? atol(arguments[1]) : 0;
  long loaded = 0;
  if (count < 4) return 2;
  state = (uint64_t)atol(arguments[2]);
  for (long i = 0; i < tries; i++) {
    FILE *file = fopen(arguments[3 + draw((uint32_t)count - 3)], "rb");
    if (!file) return 2;
    static uint8_t buffer[1 << 20];
    size_t size = fread(buffer, 1, sizeof buffer, file), at = 0, header = 0;
    fclose(file);
    while (at + 13 < size && memcmp(buffer + at, "stlm.checksum", 13)) at++;
    at += 17;
    while (header + 20 < size && memcmp(buffer + header, "model.final_norm.w", 18)) header++;
    mutate(buffer, &size, header + 64);
    if (draw(10)) set_checksum(buffer, size, at);
    uint8_t *exact = malloc(size);  // so that reading past the end is seen
    char error[STLM_ERROR_SIZE];
    if (!exact) return 2;
    memcpy(exact, buffer, size);
    stlm_model *model = stlm_load(exact, size, isas[draw(5)], error);
    free(exact);
    if (!model && !*error) return 3;  // no words
    if (model && draw(USE_ONE_IN) == 0) use(model), code(model);
    loaded += model != NULL;
    stlm_free(model);
  }
  printf("%ld files, %ld of them loaded\n", tries, loaded);
  return 0;
}
