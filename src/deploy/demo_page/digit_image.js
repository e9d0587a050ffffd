"use strict";
/*
 * Brings the digits of a drawing to the form of MNIST's images, as digit_image.py does it: light on black,
 * scaled to fit a box of 20x20, with the centre of mass in the middle of 28x28, pixel (14, 14).
 *
 * digit_image.py also reads photos, where it looks for paper, shadows, grain and printed lines. A drawing has
 * none of them. An image is { width, height, pixels }; "ink" has how dark each pixel is, 0 to 1.
 */

const MAX_DIGITS = 200;
const MIN_CONTRAST = 0.05; // of black to white
const FAINT = 0.2; // of the strongest ink; fainter pixels are not part of the strokes
const THINNEST_STROKE = 0.08; // of the digit's longer side
const PARTING_LEVELS = [0.35, 0.5, 0.65]; // of a piece's strongest ink; digits that touch may part there

/** An error whose message the page shows. */
class ReadingError extends Error {}

/**
 * The digits of a drawing in reading order, each { pixels, box }: 28x28 bytes in MNIST's form, and where it
 * lies, [left, top, right, bottom]. Throws a ReadingError if there is none, or more than MAX_DIGITS.
 *
 * @param grey the drawing's side x side bytes, black on white with a white margin
 */
function readDigits(grey, side) {
  const ink = map({ width: side, height: side, pixels: grey }, (value) => 1 - value / 255);
  const labels = labelDigits(ink);
  return findObjects(labels).map((box, i) => {
    const strokes = onlyInk(cut(ink, box), cut(labels, box).pixels, i + 1);
    return { pixels: centre(fit(thicken(strokes))), box };
  });
}

// ---- images -------------------------------------------------------------------------------------

/** Half to even, as Python rounds: Math.round takes 12.5 to 13. */
function rint(x) {
  const below = Math.floor(x);
  return x - below === 0.5 ? below + (below & 1) : Math.round(x);
}

function largest(pixels) {
  let most = 0;
  for (let i = 0; i < pixels.length; i++) most = Math.max(most, pixels[i]);
  return most;
}

/** An image of value(pixel, index, x, y). */
function map({ width, height, pixels }, value) {
  const out = new Float32Array(width * height);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) out[i] = value(pixels[i], i, x, y);
  }
  return { width, height, pixels: out };
}

/** The part of an image in a box; beyond the image it is 0. */
function cut({ width, height, pixels }, [left, top, right, bottom]) {
  const part = { width: right - left, height: bottom - top, pixels: new Float32Array((right - left) * (bottom - top)) };
  const first = Math.max(0, left), last = Math.min(width, right);
  for (let y = Math.max(0, top); y < Math.min(height, bottom); y++) {
    part.pixels.set(pixels.subarray(y * width + first, y * width + last), (y - top) * part.width + first - left);
  }
  return part;
}

/** An image in a frame of zeros. */
const pad = (image, frame) => cut(image, [-frame, -frame, image.width + frame, image.height + frame]);

/** Connected pieces, numbered from 1 as they come row by row; 0 is paper. Corners that touch connect, too. */
function label({ width, height, pixels }, isInk) {
  const labels = new Float32Array(width * height), waiting = [];
  let count = 0;
  for (let start = 0; start < labels.length; start++) {
    if (labels[start] || !isInk(pixels[start])) continue;
    labels[start] = ++count;
    waiting.push(start);
    while (waiting.length) {
      const i = waiting.pop(), x = i % width, y = (i - x) / width;
      for (let row = Math.max(0, y - 1); row <= Math.min(height - 1, y + 1); row++) {
        for (let column = Math.max(0, x - 1); column <= Math.min(width - 1, x + 1); column++) {
          const j = row * width + column;
          if (labels[j] || !isInk(pixels[j])) continue;
          labels[j] = count;
          waiting.push(j);
        }
      }
    }
  }
  return { width, height, pixels: labels };
}

/** The box of each label from 1 on. */
function findObjects({ width, pixels }) {
  const boxes = [];
  for (let i = 0; i < pixels.length; i++) {
    if (!pixels[i]) continue;
    const x = i % width, y = (i - x) / width, box = boxes[pixels[i] - 1] ??= [x, y, x, y];
    box[0] = Math.min(box[0], x);
    box[2] = Math.max(box[2], x + 1);
    box[3] = y + 1; // rows come from the top
  }
  return boxes;
}

/** For each pixel the index of the nearest one that is set, or -1 if there is none within `reach` pixels. */
function nearestSet({ width, height, pixels }, isSet, reach = Infinity) {
  const rows = new Int32Array(width * height).fill(-1); // in the same column: the nearest row
  for (let x = 0; x < width; x++) {
    for (let y = 0, above = -1; y < height; y++) rows[y * width + x] = above = isSet(pixels[y * width + x]) ? y : above;
    for (let y = height - 1, below = -1; y >= 0; y--) {
      const i = y * width + x;
      below = rows[i] === y ? y : below;
      if (below >= 0 && (rows[i] < 0 || below - y < y - rows[i])) rows[i] = below;
    }
  }
  const nearest = new Int32Array(width * height).fill(-1);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      let least = reach * reach + 1e-9;
      for (let step = 0; step < width && step * step < least; step++) {
        for (let column = x - step; column <= x + step; column += 2 * step || 1) {
          const row = column >= 0 && column < width ? rows[y * width + column] : -1;
          const distance = step * step + (row - y) * (row - y);
          if (row < 0 || distance >= least) continue;
          least = distance;
          nearest[y * width + x] = row * width + column;
        }
      }
    }
  }
  return nearest;
}

/** For each pixel the distance to the nearest one that is set, at most `reach`. */
function distances(image, isSet, reach) {
  const nearest = nearestSet(image, isSet, reach), { width } = image;
  return map(image, (_, i, x, y) => {
    if (nearest[i] < 0) return reach;
    const column = nearest[i] % width, row = (nearest[i] - column) / width;
    return Math.sqrt((column - x) ** 2 + (row - y) ** 2);
  });
}

// ---- which ink is whose -------------------------------------------------------------------------

/** Of which digit each pixel is, numbered in reading order from 1; 0 is paper. */
function labelDigits(ink) {
  const strong = largest(ink.pixels);
  if (strong < MIN_CONTRAST) throw new ReadingError("the drawing is blank: draw a digit");
  const pieces = separate(ink, label(ink, (value) => value > FAINT * strong));
  const boxes = findObjects(pieces), mass = boxes.map(() => 0);
  for (let i = 0; i < ink.pixels.length; i++) {
    if (pieces.pixels[i]) mass[pieces.pixels[i] - 1] += ink.pixels[i];
  }
  const groups = groupPieces(boxes, mass);
  if (groups.length > MAX_DIGITS) {
    throw new ReadingError(`the drawing shows ${groups.length} marks, expected at most ${MAX_DIGITS} digits`);
  }
  const digitOfPiece = [0];
  groups.forEach((group, i) => { for (const piece of group) digitOfPiece[piece + 1] = i + 1; });
  return map(pieces, (piece) => digitOfPiece[piece] ?? 0);
}

/** Divide wide pieces that only faint ink holds together: digits whose edges just touch. */
function separate(ink, pieces) {
  const boxes = findObjects(pieces), tallest = Math.max(...boxes.map(heightOf));
  let count = boxes.length;
  boxes.forEach((box, i) => {
    const [width, height] = [widthOf(box), heightOf(box)];
    if (width < height || height < Math.max(6, 0.4 * tallest)) return; // a row of digits is wide
    const mine = cut(pieces, box).pixels;
    const own = map(cut(ink, box), (value, j) => mine[j] === i + 1 ? value : 0);
    const [parts, extra] = PARTING_LEVELS.map((level) => highParts(own, level))
      .map((each) => [each, largest(each.pixels) - 1]).reduce((a, b) => b[1] > a[1] ? b : a);
    if (extra <= 0) return;
    const nearest = nearestSet(parts, (part) => part > 0);
    mine.forEach((piece, j) => {
      const part = parts.pixels[nearest[j]], x = j % width, y = (j - x) / width;
      if (piece === i + 1 && part > 1) pieces.pixels[(box[1] + y) * pieces.width + box[0] + x] = count + part - 1;
    });
    count += extra;
  });
  return pieces;
}

/** The strong parts of a piece that lie side by side, each almost as high, as labels. */
function highParts(ink, level) {
  const limit = level * largest(ink.pixels);
  const parts = label(ink, (value) => value > limit), boxes = findObjects(parts);
  const high = boxes.map((box) => heightOf(box) >= 0.6 * ink.height);
  const sum = boxes.reduce((total, box, i) => total + (high[i] ? widthOf(box) : 0), 0);
  if (sum > 1.15 * ink.width) return map(parts, () => 0); // one above the other: the halves of a lying 0
  let count = 0;
  const numbers = [0, ...high.map((is) => is ? ++count : 0)];
  return map(parts, (part) => numbers[part]);
}

// ---- the digit ----------------------------------------------------------------------------------

/** The ink of one digit alone, the strongest 1: of the pixels with its label, and of their edges, labelled 0. */
function onlyInk(ink, labels, mine) {
  const { width, height } = ink, edge = Math.max(1, rint(Math.max(width, height) / 20)); // a pixel of the result
  const isNear = (x, y) => { // so many steps along rows and columns from one of its pixels
    for (let row = Math.max(0, y - edge); row <= Math.min(height - 1, y + edge); row++) {
      const rest = edge - Math.abs(row - y), last = Math.min(width - 1, x + rest);
      for (let column = Math.max(0, x - rest); column <= last; column++) {
        if (labels[row * width + column] === mine) return true;
      }
    }
    return false;
  };
  const own = map(ink, (value, i) => labels[i] === mine ? value : 0), strong = largest(own.pixels);
  return map(ink, (value, i, x, y) =>
    labels[i] === mine || (value && labels[i] === 0 && isNear(x, y)) ? Math.min(1, value / strong) : 0);
}

/** Widen the strokes of a fine pen to what is narrow in MNIST, 1.6 pixels of 20. */
function thicken(ink) {
  const isPen = (value) => value > 0.5;
  // Of a bar's pixels the mean distance to its edge is a quarter of its width and half a pixel.
  const framed = pad(ink, 1), side = Math.max(ink.width, ink.height);
  const inside = distances(framed, (value) => !isPen(value), side).pixels.filter((_, i) => isPen(framed.pixels[i]));
  const width = 4 * inside.reduce((sum, value) => sum + value, 0) / inside.length - 2;
  const missing = rint((THINNEST_STROKE * side - width) / 2);
  if (missing < 1) return ink;
  ink = pad(ink, missing);
  const outside = distances(ink, isPen, missing + 1).pixels;
  return map(ink, (value, i) => Math.max(value, Math.min(1, Math.max(0, missing + 0.5 - outside[i]))));
}

/** Scale so that the longer side is 20 pixels and the strongest ink 1. */
function fit(ink) {
  const scale = 20 / Math.max(ink.width, ink.height);
  const [width, height] = [ink.width, ink.height].map((side) => Math.max(1, rint(side * scale)));
  const rows = resizeRows(ink, width); // and then the columns, which are the rows of what is turned
  const small = map(turn(resizeRows(turn(rows), height)), (value) => Math.max(0, value));
  const strongest = largest(small.pixels); // thin lines of a large picture fade as it shrinks
  return map(small, (value) => value / strongest);
}

const turn = ({ width, height, pixels }) =>
  map({ width: height, height: width, pixels: [] }, (_, i, x, y) => pixels[x * width + y]);

/** Lanczos' window: sinc(x) sinc(x / 3) for |x| < 3. */
function lanczos(x) {
  const sinc = (value) => value === 0 ? 1 : Math.sin(Math.PI * value) / (Math.PI * value);
  return Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0;
}

/** Each row in `width` pixels, as Pillow's LANCZOS: a pixel is a weighted mean of those around its place. */
function resizeRows(image, width) {
  if (image.width === width) return image;
  const scale = image.width / width, stretch = Math.max(1, scale), reach = 3 * stretch;
  const columns = Array.from({ length: width }, (_, x) => {
    const middle = (x + 0.5) * scale;
    const first = Math.max(0, Math.trunc(middle - reach + 0.5));
    const count = Math.min(image.width, Math.trunc(middle + reach + 0.5)) - first;
    const weights = Float64Array.from({ length: count }, (_, i) => lanczos((first + i - middle + 0.5) / stretch));
    const sum = weights.reduce((total, weight) => total + weight, 0);
    return { first, weights: weights.map((weight) => weight / sum) };
  });
  return map({ width, height: image.height, pixels: [] }, (_, i, x, y) => {
    const { first, weights } = columns[x], start = y * image.width + first;
    let sum = 0;
    for (let j = 0; j < weights.length; j++) sum += weights[j] * image.pixels[start + j];
    return sum;
  });
}

/** Place in 28x28 with the centre of mass on pixel (14, 14), or as near as the digit fits; in bytes. */
function centre({ width, height, pixels }) {
  let mass = 0, across = 0, down = 0;
  pixels.forEach((value, i) => {
    mass += value;
    across += value * (i % width);
    down += value * Math.floor(i / width);
  });
  const left = Math.max(0, Math.min(28 - width, rint(14 - across / mass)));
  const top = Math.max(0, Math.min(28 - height, rint(14 - down / mass)));
  const canvas = new Uint8Array(28 * 28);
  pixels.forEach((value, i) => {
    canvas[(top + Math.floor(i / width)) * 28 + left + i % width] = rint(255 * value);
  });
  return canvas;
}
