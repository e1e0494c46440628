// SPDX-License-Identifier: Apache-2.0

/** UTF-8, if it is a string. Texts need not be valid UTF-8. */
export type Text = string | Uint8Array;

export interface Sampling {
  /** 0, the default, writes the likeliest bytes. */
  temperature?: number;
  /** Draw from that many of the likeliest bytes; 0 for all. */
  topK?: number;
  /** Draw from the likeliest bytes that have this probability together. */
  topP?: number;
  /** Draw from bytes at least so likely, relative to the likeliest. */
  minP?: number;
  /** 1 for none. */
  repetitionPenalty?: number;
  /** The same seed draws the same bytes. */
  seed?: number;
}

/**
 * A model, and the text that it has read. Calls that take a text read only what differs from the text before: the state
 * after their common prefix is kept.
 */
export class Engine {
  /**
   * @param source A GGUF file that `modeling_stlm.inference.export` wrote: where it is, or its bytes.
   * @param options.wasm Where stlm.wasm is, unless it lies beside this module. The first call that finds it decides.
   * @throws Error in words, for a damaged, truncated, foreign or newer file.
   */
  static load(source: string | URL | Blob | ArrayBuffer | ArrayBufferView, options?: { wasm?: string | URL }): Promise<Engine>;
  private constructor();

  /** Ids of the model: bytes are 0 to 255, special tokens follow. */
  readonly vocabSize: number;
  /** The token that stands for an empty text. */
  readonly bosId: number;
  /** Tokens that end a text. */
  readonly endIds: readonly number[];
  /** The text so far: that of the last call, and what was written after it. */
  readonly text: Uint8Array;

  /** Makes `text` the text so far. */
  prompt(text: Text): void;
  /** Adds one byte, or special token, to the text so far. */
  step(byte: number): void;
  /** Logits of the byte after the text so far: (vocabSize). */
  logits(): Float32Array;
  /** Probabilities of the byte, or special token, after the text so far: (vocabSize). */
  nextBytes(): Float32Array;

  /** Up to `maxNewBytes` (256) bytes that follow `text`. */
  generate(text: Text, maxNewBytes?: number, options?: Sampling): Uint8Array;
  /** As `generate`, in whole characters. Bytes that are no UTF-8 come as U+FFFD. */
  stream(text: Text, maxNewBytes?: number, options?: Sampling): Generator<string, void, void>;
  /** The likeliest bytes after `text`, whole characters, without one that is begun and not ended. Up to 32 by default. */
  complete(text: Text, maxNewBytes?: number): string;
  /** `text`, cut where patches end; the last item is the patch that has not ended, perhaps "". */
  patches(text: Text): string[];
}
