// SPDX-License-Identifier: Apache-2.0
import { Engine } from "./stlm/stlm.mjs";

const COMPLETION = 48; // bytes
const BARS = 8;
const SLICE = 12; // milliseconds of work between two frames
const READ_AT_ONCE = 1024; // bytes of a long text between two frames
const NAMES = { 9: "⇥", 10: "↵", 32: "␣" };

const $ = (id) => document.getElementById(id);
const [text, mirror, speed] = [$("text"), $("mirror"), $("speed")];
const frame = () => new Promise(requestAnimationFrame);
const utf8 = (string) => new TextEncoder().encode(string);

let engine;
let model = "No model"; // its name
let completion = ""; // shown after the text
let turn = 0; // counts changes of the text: work for an earlier one stops
let isWriting = false;

// A model

async function open(source, name) {
  say("");
  $("about").value = `Loading ${name}`;
  try {
    engine = await Engine.load(source);
    $("about").value = model = name;
    text.disabled = $("write").disabled = false;
    text.placeholder = "Type.";
    text.focus();
    await update();
  } catch (error) {
    $("about").value = model;
    say(`${name}: ${error.message}`);
  }
}

function say(message) {
  $("message").textContent = message;
  $("message").hidden = !message;
}

// The text

async function update() {
  if (!engine) return;
  const mine = ++turn;
  showCompletion("");
  const string = text.value;
  const bytes = utf8(string);
  for (let end = READ_AT_ONCE; end < bytes.length; end += READ_AT_ONCE) {
    engine.prompt(bytes.subarray(0, end));
    speed.value = `reading ${Math.round((100 * end) / bytes.length)}%`;
    await frame();
    if (turn !== mine) return;
  }
  showPatches(engine.patches(string));
  showNext(string);
  if (isWriting) return;
  const start = performance.now();
  const found = engine.complete(string, COMPLETION);
  showSpeed(utf8(found).length, start);
  showCompletion(found);
}

function insert(string) {
  text.focus();
  text.setSelectionRange(text.value.length, text.value.length);
  document.execCommand("insertText", false, string); // unlike a change of `value`, it can be undone
}

async function write() {
  if (isWriting) {
    isWriting = false;
    return;
  }
  isWriting = true;
  $("write").textContent = "Stop";
  const options = { temperature: Number($("temperature").value), topP: 0.95, seed: Date.now() };
  while (isWriting) {
    const start = performance.now();
    let written = "";
    for (const characters of engine.stream(text.value, Infinity, options)) {
      written += characters;
      if (performance.now() - start > SLICE) break;
    }
    showSpeed(utf8(written).length, start);
    if (!written) break; // the text has ended
    insert(written);
    await frame();
  }
  isWriting = false;
  $("write").textContent = "Write on";
  await update();
}

// Pictures

function showSpeed(count, start) {
  const perSecond = (1000 * count) / (performance.now() - start);
  speed.value = Number.isFinite(perSecond) ? `${Math.round(perSecond).toLocaleString("en")} bytes/s` : "";
}

function showPatches(patches) {
  const open = patches.pop();
  const spans = patches.filter(Boolean).map((patch, i) => span(patch, i % 2 ? "odd" : "even"));
  mirror.replaceChildren(...spans, span(open, "open"), span("", "ghost"), "\u200b");
  const bytes = engine.text.length;
  const average = (bytes - utf8(open).length) / spans.length;
  $("patches").value = `${bytes} bytes, ${spans.length} patches` + (spans.length ? ` of ${average.toFixed(1)} bytes.` : ".");
}

function span(string, name) {
  const element = document.createElement("span");
  element.className = name;
  element.textContent = string;
  return element;
}

function showCompletion(string) {
  completion = text.selectionStart === text.value.length ? string : "";
  const ghost = mirror.querySelector(".ghost");
  if (ghost) ghost.textContent = completion;
  $("accept").disabled = $("word").disabled = !completion;
}

/** The character that `id` is or, most likely, begins after `string`: [what is shown, what is inserted, its number]. */
function describe(string, id) {
  if (id >= 256) return [engine.endIds.includes(id) ? "end" : "", "", id];
  const hex = (byte) => byte.toString(16).toUpperCase().padStart(2, "0");
  if (id < 128) {
    const character = String.fromCharCode(id);
    return [NAMES[id] ?? (id < 32 || id === 127 ? "" : character), character, hex(id)];
  }
  engine.prompt(string);
  engine.step(id);
  const bytes = Uint8Array.of(id, ...engine.generate(engine.text, 3));
  const [character = ""] = new TextDecoder().decode(bytes, { stream: true });
  return character === "\ufffd" ? ["", "", hex(id)] : [character, character, hex(id)];
}

function showNext(string) {
  const probabilities = engine.nextBytes();
  const best = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]).slice(0, BARS);
  const rows = best.map((id, i) => {
    const [label, character, bytes] = describe(string, id);
    const share = probabilities[id];
    const group = svg("g", { transform: `translate(0 ${i * 28})` });
    const bar = svg("rect", { y: 5, height: 14, rx: 3 });
    bar.style.width = `calc(${share} * (100% - 8.5rem))`;
    group.append(
      svg("text", { x: 14, y: 12, class: "character" }, label),
      svg("text", { x: 34, y: 12, class: "bytes" }, bytes),
      svg("rect", { y: 5, height: 14, rx: 3, class: "track" }),
      bar,
      svg("text", { x: "100%", y: 12, class: "value" }, share < 0.001 ? "< 0.1%" : `${(100 * share).toFixed(1)}%`),
    );
    if (character) group.addEventListener("click", () => insert(character));
    return group;
  });
  $("next").setAttribute("height", 28 * BARS);
  $("next").replaceChildren(...rows);
}

function svg(name, attributes, content = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = content;
  return element;
}

// What the user does

/** The first patch of the completion, which is part of a patch of the text if one is open. */
function firstPatch() {
  const patches = engine.patches(text.value);
  return engine.patches(text.value + completion)[patches.length - 1].slice(patches.at(-1).length);
}

text.addEventListener("input", update);
document.addEventListener("selectionchange", () => text.selectionStart < text.value.length && showCompletion(""));
text.addEventListener("keydown", (event) => {
  const isPlain = !event.shiftKey && !event.ctrlKey && !event.altKey && !event.metaKey && !event.isComposing;
  if (!completion || !isPlain) return;
  if (event.key === "Tab") insert(completion);
  else if (event.key === "ArrowRight") insert(firstPatch());
  else if (event.key === "Escape") showCompletion(""); // then Tab moves on, as it does elsewhere
  else return;
  event.preventDefault();
});
$("accept").addEventListener("click", () => insert(completion));
$("word").addEventListener("click", () => insert(firstPatch()));
$("write").addEventListener("click", write);
$("temperature").addEventListener("input", (event) => (event.target.nextElementSibling.value = event.target.value));
$("file").addEventListener("change", ({ target }) => target.files[0] && open(target.files[0], target.files[0].name));
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", name === "dragover");
    const file = name === "drop" && event.dataTransfer.files[0];
    if (file) open(file, file.name);
  });
}

const parameters = new URLSearchParams(location.search);
text.value = parameters.get("text") ?? "";
if (parameters.has("model")) open(parameters.get("model"), parameters.get("model").split("/").at(-1));
