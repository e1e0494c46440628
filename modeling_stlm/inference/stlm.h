// SPDX-License-Identifier: Apache-2.0
// The engine of STLM: runs a model that `python -m modeling_stlm.inference.export` wrote. See stlm.c.
#ifndef STLM_H
#define STLM_H

#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#define STLM_API __declspec(dllexport)
#else
#define STLM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
  STLM_VERSION = 3,  // of this interface: raised with every change of a struct or of the arguments of a function
  STLM_ERROR_SIZE = 256,
  STLM_SEGMENT = 512  // bytes
};

typedef struct stlm_model stlm_model;        // weights, read only: any number of batches and threads share one
typedef struct stlm_batch stlm_batch;        // rows of text with their states, and scratch memory: one thread at a time
typedef struct stlm_snapshot stlm_snapshot;  // the state of a row after some byte

typedef struct stlm_coder stlm_coder;        // see stlm_encoder

typedef struct {
  const char *isa;  // instructions in use
  const char *source;  // digest of the model that was exported
  int32_t vocab_size, bos_id;
  int32_t num_ends;
  const int32_t *ends;  // ids that end a text
  size_t snapshot_size;  // bytes of a snapshot
} stlm_about;

typedef struct {
  float temperature;  // 0: the likeliest id
  float top_p, min_p;  // 1 and 0: all ids
  float repetition_penalty;  // 1: none
  int32_t top_k;  // 0: all ids
  int32_t num_ends;
  const int32_t *ends;  // ids that end a row
} stlm_sampling;

STLM_API int stlm_version(void);  // STLM_VERSION of the library

// A model from the bytes of a GGUF file, which may be freed afterwards. `isa` is "scalar", "simd128", "avx2", "avx512", or ""
// for the fastest that this CPU has. NULL with a sentence in `error` (STLM_ERROR_SIZE chars) if that fails.
STLM_API stlm_model *stlm_load(const void *file, size_t size, const char *isa, char *error);
STLM_API void stlm_free(stlm_model *model);
STLM_API const stlm_about *stlm_describe(const stlm_model *model);

// `num_rows` empty rows; NULL without memory. The model must outlive them.
STLM_API stlm_batch *stlm_open(const stlm_model *model, int num_rows);
STLM_API void stlm_close(stlm_batch *batch);
STLM_API int stlm_length(const stlm_batch *batch, int row);
// Ids up to the end of every complete patch of a row, valid until it changes; `count` of them, perhaps NULL for none.
STLM_API const int32_t *stlm_patches(const stlm_batch *batch, int row, int *count);

// The functions below return 0, or -1 with a sentence in stlm_error(batch); the rows are then as after the last success
// or, without memory in the middle of a long text, after the part of it that was read.

// Row r reads counts[r] more ids; `ids` holds those of row 0, then those of row 1, and so on.
STLM_API int stlm_read(stlm_batch *batch, const int32_t *counts, const int32_t *ids);
// As stlm_read, with the natural logarithm of the probability that each id had in `log_probabilities`.
STLM_API int stlm_score(stlm_batch *batch, const int32_t *counts, const int32_t *ids, float *log_probabilities);
// As stlm_read, with the logits before each id: (number of ids, vocab_size).
STLM_API int stlm_read_logits(stlm_batch *batch, const int32_t *counts, const int32_t *ids, float *logits);
// Logits of the next id: (num_rows, vocab_size).
STLM_API int stlm_logits(stlm_batch *batch, float *logits);
// Up to `count` more ids for every row r with active[r], sampled as samplings[r] says, to ids (num_rows, count), -1 past the
// end of a row. A row whose text ended is no longer active. The draw depends on seeds[r] and the length of the row only.
STLM_API int stlm_write(stlm_batch *batch, const stlm_sampling *samplings, const uint64_t *seeds, uint8_t *active, int count,
                        int32_t *ids);
STLM_API const char *stlm_error(const stlm_batch *batch);

// Back to an earlier state, in time that depends on the bytes taken back only (a few ns each). NULL without memory.
STLM_API stlm_snapshot *stlm_take(const stlm_batch *batch, int row);
// Fails if the row no longer begins with the text that it had when the snapshot was taken.
STLM_API int stlm_rewind(stlm_batch *batch, int row, const stlm_snapshot *snapshot);
STLM_API void stlm_drop(stlm_snapshot *snapshot);

// Of stlm.c for zip.c: whether `batch` is one row of `model`; an error, as of the functions above.
int stlm_is_row_of(const stlm_batch *batch, const stlm_model *model);
int stlm_refuse(stlm_batch *batch, const char *sentence);

// zip.c: bytes in an arithmetic code with the probabilities that the only row of `batch` gives them, in segments of
// STLM_SEGMENT bytes and a shorter one (also of none), with which the code ends: calls after it fail. The row must have read
// the same before a segment is decoded as before it was encoded; what it has read after it is not said. NULL without memory,
// or for a vocabulary without all bytes. The code of a decoder must outlive it.
STLM_API stlm_coder *stlm_encoder(const stlm_model *model);
STLM_API stlm_coder *stlm_decoder(const stlm_model *model, const void *code, size_t size);
STLM_API void stlm_coder_close(stlm_coder *coder);
// The code of the next segment goes to `to`, with room for 16 * STLM_SEGMENT. Returns its length; -1: see stlm_error(batch).
STLM_API int stlm_encode(stlm_coder *coder, stlm_batch *batch, const uint8_t *bytes, int count, uint8_t *to);
// The next segment goes to `to`, with room for STLM_SEGMENT. Returns its length; -1: see stlm_error(batch); -2: the code ends
// before it.
STLM_API int stlm_decode(stlm_coder *coder, stlm_batch *batch, uint8_t *to);

#ifdef __cplusplus
}
#endif
#endif
