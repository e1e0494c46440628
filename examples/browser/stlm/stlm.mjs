// SPDX-License-Identifier: Apache-2.0
// The engine of STLM in browsers and in node. Types and documentation: stlm.d.mts. The work is done by stlm.c.

const ERROR_SIZE = 256; // of stlm.h
const PIECE = 256; // bytes read at once, after each of which there is a snapshot
const [SEED, ACTIVE] = [32, 40]; // places after a stlm_sampling
const MAX_SNAPSHOTS = 128; // 20 kB each with stlm-10m
const OPTIONS = { temperature: 0, topK: 0, topP: 1, minP: 0, repetitionPenalty: 1, seed: 0 };
const RANGES = {
  temperature: (value) => value >= 0,
  topK: (value) => Number.isInteger(value) && value >= 0,
  topP: (value) => value > 0 && value <= 1,
  minP: (value) => value >= 0 && value <= 1,
  repetitionPenalty: (value) => value > 0,
  seed: Number.isSafeInteger,
};

let compiled; // the promise of a module: all engines share its code

const decoder = () => new TextDecoder("utf-8", { ignoreBOM: true });
const bytesOf = (text) => (typeof text === "string" ? new TextEncoder().encode(text) : text);

/** The bytes of a URL, a Blob, an ArrayBuffer, or a view of one. */
async function read(source) {
  if (ArrayBuffer.isView(source)) return new Uint8Array(source.buffer, source.byteOffset, source.byteLength);
  if (source instanceof ArrayBuffer) return new Uint8Array(source);
  if (source instanceof Blob) return new Uint8Array(await source.arrayBuffer());
  if (source instanceof URL && source.protocol === "file:" && globalThis.process?.versions?.node) {
    const { readFile } = await import("node:fs/promises"); // which fetch does not do
    return readFile(source);
  }
  const response = await fetch(source);
  if (!response.ok) throw new Error(`${source}: the server answered ${response.status} ${response.statusText}`);
  return new Uint8Array(await response.arrayBuffer());
}

export class Engine {
  #wasm; // exports of the module
  #model;
  #rows; // of the only row
  #buffer; // PIECE ids, and what stlm_write takes
  #logits;
  #ids = []; // the text so far
  #changes = 0; // of the text
  #snapshots = []; // [length of a prefix of #ids, handle]: shortest first, the first is that of the empty row

  static async load(source, { wasm = new URL("stlm.wasm", import.meta.url) } = {}) {
    compiled ??= read(wasm)
      .then(WebAssembly.compile)
      .catch((error) => {
        compiled = undefined; // the next call tries again
        throw error;
      });
    const [module, file] = await Promise.all([compiled, read(source)]);
    const imports = { env: { emscripten_notify_memory_growth() {} } };
    return new Engine(file, (await WebAssembly.instantiate(module, imports)).exports);
  }

  /** Use `Engine.load`. */
  constructor(file, wasm) {
    this.#wasm = wasm;
    wasm._initialize();
    const error = this.#take(ERROR_SIZE);
    const data = this.#take(file.length);
    this.#bytes.set(file, data);
    this.#bytes[error] = 0; // also the name of the fastest instructions
    this.#model = wasm.stlm_load(data, file.length, error, error);
    wasm.free(data);
    if (!this.#model) throw new Error(this.#string(error));
    const about = this.#integers.subarray(wasm.stlm_describe(this.#model) / 4);
    [, , this.vocabSize, this.bosId] = about;
    this.endIds = [...this.#integers.subarray(about[5] / 4, about[5] / 4 + about[4])];
    this.#rows = wasm.stlm_open(this.#model, 1);
    this.#buffer = this.#take(4 * PIECE + 64);
    this.#logits = this.#take(4 * this.vocabSize);
    if (!this.#rows) throw new Error("not enough memory for a text");
    this.#snapshot();
  }

  /** Bytes of the text so far, or the token that begins documents. */
  get text() {
    return Uint8Array.from(this.#ids.filter((id) => id < 256));
  }

  prompt(text) {
    const bytes = bytesOf(text);
    const ids = bytes.length ? bytes : [this.bosId];
    let same = 0;
    while (same < ids.length && ids[same] === this.#ids[same]) same++;
    if (same < this.#ids.length) this.#rewind(same);
    while (this.#ids.length < ids.length) {
      const start = this.#ids.length;
      this.#read(ids.slice(start, Math.min(ids.length, start - (start % PIECE) + PIECE)));
    }
  }

  step(byte) {
    if (!(Number.isInteger(byte) && byte >= 0 && byte < this.vocabSize)) {
      throw new RangeError(`expected a byte, or an id below ${this.vocabSize}, got ${byte}`);
    }
    this.#read([byte]);
  }

  logits() {
    this.#check(this.#wasm.stlm_logits(this.#rows, this.#logits));
    return new Float32Array(this.#wasm.memory.buffer, this.#logits, this.vocabSize).slice();
  }

  nextBytes() {
    const logits = this.logits();
    const largest = Math.max(...logits);
    const weights = logits.map((logit) => Math.exp(logit - largest));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    return weights.map((weight) => weight / total);
  }

  generate(text, maxNewBytes = 256, options = {}) {
    this.prompt(text);
    const sampling = this.#sampling(options);
    const written = [];
    let isActive = true;
    for (let count = 0; count < maxNewBytes && isActive; count += PIECE) {
      const ids = this.#write(sampling, Math.min(PIECE, maxNewBytes - count));
      written.push(...ids.filter((id) => id < 256));
      isActive = this.#bytes[sampling + ACTIVE] === 1;
    }
    return Uint8Array.from(written);
  }

  *stream(text, maxNewBytes = 256, options = {}) {
    this.prompt(text);
    const sampling = this.#sampling(options);
    const characters = decoder();
    let isActive = true;
    for (let count = 0; count < maxNewBytes && isActive; count++) {
      const ids = this.#write(sampling, 1).filter((id) => id < 256);
      isActive = this.#bytes[sampling + ACTIVE] === 1;
      const changes = this.#changes;
      const whole = characters.decode(Uint8Array.from(ids), { stream: true });
      if (whole) yield whole;
      if (this.#changes !== changes) throw new Error("the engine was given another text while it wrote this one");
    }
  }

  complete(text, maxNewBytes = 32) {
    return decoder().decode(this.generate(text, maxNewBytes), { stream: true });
  }

  patches(text) {
    this.prompt(text);
    const count = this.#take(4);
    const at = this.#wasm.stlm_patches(this.#rows, 0, count) / 4;
    const ends = this.#integers.slice(at, at + this.#integers[count / 4]);
    this.#wasm.free(count);
    const characters = decoder();
    const pieces = [];
    let start = 0;
    for (const end of [...ends, this.#ids.length]) {
      const bytes = this.#ids.slice(start, end).filter((id) => id < 256);
      pieces.push(characters.decode(Uint8Array.from(bytes), { stream: pieces.length < ends.length }));
      start = end;
    }
    return pieces;
  }

  // Memory of the module: views of it are detached when it grows, so new ones are made.

  get #bytes() {
    return new Uint8Array(this.#wasm.memory.buffer);
  }

  get #integers() {
    return new Int32Array(this.#wasm.memory.buffer);
  }

  #take(size) {
    const at = this.#wasm.malloc(size);
    if (!at) throw new Error(`not enough memory: ${size} bytes more`);
    return at;
  }

  #string(at) {
    const bytes = this.#bytes;
    return decoder().decode(bytes.slice(at, bytes.indexOf(0, at)));
  }

  #check(status) {
    if (!status) return;
    const message = this.#string(this.#wasm.stlm_error(this.#rows));
    this.#wasm.stlm_rewind(this.#rows, 0, this.#snapshots.at(-1)[1]); // without memory, part of a text was read
    throw new Error(message);
  }

  // The row, its text and its snapshots.

  #snapshot() {
    const handle = this.#wasm.stlm_take(this.#rows, 0);
    if (!handle) throw new Error("not enough memory for a snapshot");
    this.#changes++;
    this.#snapshots.push([this.#ids.length, handle]);
    if (this.#snapshots.length <= MAX_SNAPSHOTS) return;
    const oldest = this.#snapshots.findIndex(([length]) => length % PIECE !== 0); // those between pieces stay
    for (const [, old] of this.#snapshots.splice(Math.max(oldest, 1), 1)) this.#wasm.stlm_drop(old);
  }

  /** Back to the last snapshot within the first `length` ids. */
  #rewind(length) {
    while (this.#snapshots.at(-1)[0] > length) this.#wasm.stlm_drop(this.#snapshots.pop()[1]);
    const [known, handle] = this.#snapshots.at(-1);
    this.#check(this.#wasm.stlm_rewind(this.#rows, 0, handle));
    this.#ids.length = known;
    this.#changes++;
  }

  #read(ids) {
    this.#integers.set([...ids, ids.length], this.#buffer / 4);
    this.#check(this.#wasm.stlm_read(this.#rows, this.#buffer + 4 * ids.length, this.#buffer));
    this.#ids.push(...ids);
    this.#snapshot();
  }

  /** Fills a stlm_sampling, and after it the seed of the row and whether it is active; returns where it is. */
  #sampling(options) {
    for (const [name, value] of Object.entries(options)) {
      if (!(name in OPTIONS)) throw new TypeError(`unknown option ${name}, expected ${Object.keys(OPTIONS).join(", ")}`);
      if (!RANGES[name](value)) throw new RangeError(`${name}=${value} is out of its range`);
    }
    const { temperature, topK, topP, minP, repetitionPenalty, seed } = { ...OPTIONS, ...options };
    const ends = this.#integers[this.#wasm.stlm_describe(this.#model) / 4 + 5];
    const at = this.#buffer + 4 * PIECE;
    const view = new DataView(this.#wasm.memory.buffer, at, 64);
    [temperature, topP, minP, repetitionPenalty].forEach((value, i) => view.setFloat32(4 * i, value, true));
    [topK, this.endIds.length, ends].forEach((value, i) => view.setInt32(16 + 4 * i, value, true));
    view.setBigInt64(SEED, BigInt(seed), true);
    view.setUint8(ACTIVE, 1);
    return at;
  }

  /** Up to `count` more ids, which belong to the text from now on. */
  #write(sampling, count) {
    this.#check(this.#wasm.stlm_write(this.#rows, sampling, sampling + SEED, sampling + ACTIVE, count, this.#buffer));
    const written = this.#integers.subarray(this.#buffer / 4, this.#buffer / 4 + count);
    const ids = [...written].filter((id) => id >= 0 && !this.endIds.includes(id));
    this.#ids.push(...ids);
    this.#snapshot();
    return ids;
  }
}
