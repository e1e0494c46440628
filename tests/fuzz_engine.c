// SPDX-License-Identifier: Apache-2.0
// Mutated files and random calls for a build with sanitizers:
//
//   gcc -g -O1 -std=c99 -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -Wno-psabi
//       -I modeling_stlm/inference tests/fuzz_engine.c modeling_stlm/inference/stlm.c modeling_stlm/inference/zip.c -lm -o fuzz
//   ./fuzz COUNT SEED model.gguf ...
//
// Prints how many files were tried and how many of them were loaded. Most mutations get a checksum that fits.
#include "stlm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
      case 2: stlm_write(batch, &sampling, seeds, active, 1 + (int)draw(20), ids); break;
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

// What is coded must come back, whatever the model says; code that was changed, or another text, may.
static void code(const stlm_model *model) {
  uint8_t bytes[STLM_SEGMENT], code[16 * STLM_SEGMENT], decoded[STLM_SEGMENT];
  const int count = (int)draw(100), bos = 257;
  const int32_t one = 1, start = bos < stlm_describe(model)->vocab_size ? bos : 0;
  for (int i = 0; i < count; i++) bytes[i] = (uint8_t)(draw(4) ? "ab \n"[draw(4)] : (int)draw(256));
  for (int is_changed = 0; is_changed < 2; is_changed++) {
    stlm_batch *writer = stlm_open(model, 1), *reader = stlm_open(model, 1);
    stlm_coder *encoder = stlm_encoder(model), *decoder = NULL;
    int size = -1, length = -1;
    if (!writer || !reader) exit(2);
    if (encoder && !stlm_read(writer, &one, &start)) size = stlm_encode(encoder, writer, bytes, count, code);
    if (is_changed && size > 0) code[draw((uint32_t)size)] ^= (uint8_t)(1 << draw(8));
    if (size > 0) decoder = stlm_decoder(model, code, (size_t)size);
    if (decoder && !stlm_read(reader, &one, &start)) length = stlm_decode(decoder, reader, decoded);
    if (decoder && !is_changed && (length != count || memcmp(bytes, decoded, (size_t)count))) exit(4);
    stlm_coder_close(encoder), stlm_coder_close(decoder);
    stlm_close(writer), stlm_close(reader);
  }
}

int main(int count, char **arguments) {
  static const char *const isas[] = {"", "scalar", "avx2", "avx512"};
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
    stlm_model *model = stlm_load(exact, size, isas[draw(4)], error);
    free(exact);
    if (!model && !*error) return 3;  // no words
    if (model) use(model), code(model);
    loaded += model != NULL;
    stlm_free(model);
  }
  printf("%ld files, %ld of them loaded\n", tries, loaded);
  return 0;
}
