"use strict";
/*
 * Where script.js gets its answers in a page that is one file: from the network in it, in place of server.js.
 *
 * webpage.py puts the trained model into the page as MODEL. A tensor is there as text, base64 of little-endian
 * numbers, in the type that its reader is named for.
 */

/** The bytes of a text in base64. */
function bytesOf(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes.buffer;
}

const float32 = (base64) => new Float32Array(bytesOf(base64));

/** The upper halves of float32 numbers. */
function bfloat16(base64) {
  const bits = new Uint32Array(new Uint16Array(bytesOf(base64))).map((half) => half << 16);
  return new Float32Array(bits.buffer);
}

/** All numbers of 16 bits: sign, five bits of exponent, ten of fraction. */
const HALVES = Float32Array.from({ length: 2 ** 16 }, (_, bits) => {
  const exponent = bits >> 10 & 31, fraction = bits & 1023;
  const value = exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
  return bits >> 15 ? -value : value;
});
const float16 = (base64) => new Float32Array(new Uint16Array(bytesOf(base64))).map((bits) => HALVES[bits]);

const state = Object.fromEntries(Object.entries(MODEL.state).map(([name, base64]) => [name, float16(base64)]));
const model = new ViT(MODEL.config, state);
const { temperature, threshold, whitening, centres } = MODEL.calibration;
const calibration = threshold === undefined ? {} :
  { threshold, whitening: bfloat16(whitening), centres: float32(centres) };

/** What the page shows of 28x28 bytes in MNIST's form: as demo_app.py answers, without the box. */
function answerImage(pixels) {
  const { mean: [mean], std: [std] } = MODEL.normalization, { class_names, words, image_size } = MODEL.about;
  const { logits, vectors } = readImage(model, Float32Array.from(pixels, (pixel) => (pixel / 255 - mean) / std));
  const probabilities = [...softmax(logits.map((logit) => logit / temperature))];
  const confidence = Math.max(...probabilities);
  return {
    prediction: class_names[probabilities.indexOf(confidence)],
    confidence,
    [words.strange_key]: isStrange(vectors, calibration),
    probabilities,
    received: Array.from({ length: image_size }, (_, row) =>
      [...pixels.subarray(row * image_size, (row + 1) * image_size)]),
    attention: patchMap(rollout(model), model),
  };
}

function answerDrawing(grey, side) {
  try {
    const digits = readDigits(grey, side);
    return { size: [side, side], digits: digits.map(({ pixels, box }) => ({ ...answerImage(pixels), box })) };
  } catch (error) {
    if (error instanceof ReadingError) return { error: error.message };
    throw error;
  }
}

let last = { grey: [], answer: null }; // a stroke's end often adds nothing to what was read as it went on
const isSame = (a, b) => a.length === b.length && a.every((value, i) => value === b[i]);

const reader = {
  note: "It runs in this page: what you draw stays here.",

  /** What the page says of the model. */
  async describe() {
    return MODEL.about;
  },

  /** What is in a drawing, side x side bytes, black on white. */
  async readDrawing(grey, side) {
    if (!isSame(grey, last.grey)) last = { grey, answer: answerDrawing(grey, side) };
    return last.answer;
  },

  readPicture: null, // photos of paper need digit_image.py
};

/** Browsers compile what has run a few times; the first stroke should not have to wait for that. */
function warmUp() {
  const side = 300, bar = new Uint8Array(side * side).fill(255);
  for (let y = 60; y < 240; y++) bar.fill(0, y * side + 140, y * side + 150);
  for (let i = 0; i < 4; i++) answerDrawing(bar, side);
}
setTimeout(warmUp);
