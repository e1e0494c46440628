// SPDX-License-Identifier: Apache-2.0
// Logits after every byte, to compare another machine with this one: logits MODEL.gguf ISA <text >logits
#include <stdio.h>
#include <stdlib.h>

#include "stlm.h"

int main(int argc, char **argv) {
  char error[STLM_ERROR_SIZE];
  FILE *file = argc == 3 ? fopen(argv[1], "rb") : NULL;
  char *data = malloc(1 << 24);
  if (!file || !data) return fprintf(stderr, "usage: logits MODEL.gguf ISA <text >logits\n"), 1;
  stlm_model *model = stlm_load(data, fread(data, 1, 1 << 24, file), argv[2], error);
  if (!model) return fprintf(stderr, "%s\n", error), 1;
  stlm_batch *row = stlm_open(model, 1);
  const size_t vocab = (size_t)stlm_describe(model)->vocab_size;
  float *logits = malloc(sizeof(float) * vocab);
  for (int byte; (byte = getchar()) != EOF;) {
    const int32_t count = 1, id = byte;
    if (stlm_read(row, &count, &id) || stlm_logits(row, logits)) return fprintf(stderr, "%s\n", stlm_error(row)), 1;
    fwrite(logits, sizeof(float), vocab, stdout);
  }
  free(logits), free(data), fclose(file);
  stlm_close(row), stlm_free(model);
  return 0;
}
