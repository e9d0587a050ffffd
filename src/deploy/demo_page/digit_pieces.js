"use strict";
/*
 * Sorts pieces of ink, connected strokes, into digits, as digit_pieces.py does it: which belong together, in
 * which order.
 *
 * A box is [left, top, right, bottom] in pixels, the last two beyond the ink. Limits are shares of a digit's
 * height, for which the median of the pieces' longer sides, weighted by ink, is taken. digit_pieces.py says
 * what each is for.
 */

const MAX_PIECES = 400;
const SPECK = 0.3;
const [MIN_HEIGHT, MIN_SIDE] = [0.4, 0.5];
const TALL = 0.8;
const DOT = 0.45;
const NEAR = 0.04;
const STACK_GAP = 0.2;
const [BAR, BAR_GAP] = [0.3, 0.2];
const [OPEN_GAP, OPEN_STEM] = [0.27, 0.45];

const widthOf = ([left, , right]) => right - left;
const heightOf = ([, top, , bottom]) => bottom - top;
const longerSide = (box) => Math.max(widthOf(box), heightOf(box));

/** The pieces of each digit, as indices, the digits in reading order; `mass` is the ink of each piece. */
function groupPieces(boxes, mass) {
  const height = typicalHeight(boxes, mass);
  const order = [...boxes.keys()].sort((i, j) => mass[j] - mass[i]);
  const isSpeck = (i) => longerSide(boxes[i]) < SPECK * height;
  let groups = order.filter((i) => !isSpeck(i)).slice(0, MAX_PIECES)
    .map((i) => ({ pieces: [i], box: boxes[i] }));
  groups = joinPieces(groups, height);
  const tallest = Math.max(...groups.map(({ box }) => longerSide(box)));
  const isDigit = ({ box }) => heightOf(box) >= MIN_HEIGHT * height && longerSide(box) >= MIN_SIDE * height;
  const isLong = ({ box }) => longerSide(box) >= Math.min(MIN_SIDE * height, tallest);
  // A lying stroke with nothing to compare it with, or marks alone, are digits if they are long.
  groups = groups.filter(groups.some(isDigit) ? isDigit : isLong);
  for (const speck of order.filter(isSpeck).slice(0, 10 * MAX_PIECES)) {
    const distances = groups.map(({ box }) => Math.max(...gaps(box, boxes[speck])));
    const nearest = Math.min(...distances);
    if (nearest <= NEAR * height) groups[distances.indexOf(nearest)].pieces.push(speck);
  }
  return readingOrder(groups.map(({ box }) => box)).map((i) => groups[i].pieces);
}

/** The median longer side, not height: the pieces of a broken digit may all be low. */
function typicalHeight(boxes, mass) {
  const order = [...boxes.keys()].sort((i, j) => longerSide(boxes[i]) - longerSide(boxes[j]));
  let left = mass.reduce((sum, each) => sum + each, 0) / 2;
  return longerSide(boxes[order.find((i) => (left -= mass[i]) <= 0) ?? order.at(-1)]);
}

/** The box around both. */
function hull(a, b) {
  return [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[2], b[2]), Math.max(a[3], b[3])];
}

/** The gaps between boxes along x and y; negative where they overlap. */
function gaps(a, b) {
  return [0, 1].map((i) => Math.max(a[i], b[i]) - Math.min(a[i + 2], b[i + 2]));
}

/** Join groups, the nearest first, until no two are parts of one digit. */
function joinPieces(groups, height) {
  for (;;) {
    let least = Infinity, pair = null;
    for (const a of groups) {
      for (const b of groups) {
        if (a === b || !areOne(a.box, b.box, height)) continue;
        const distance = Math.max(0, ...gaps(a.box, b.box));
        if (distance < least) [least, pair] = [distance, [a, b]];
      }
    }
    if (!pair) return groups;
    const [a, b] = pair;
    Object.assign(a, { pieces: [...a.pieces, ...b.pieces], box: hull(a.box, b.box) });
    groups = groups.filter((group) => group !== b);
  }
}

/** Whether two pieces are of one digit and `a` begins no further right than `b`. */
function areOne(a, b, height) {
  const [gapX, gapY] = gaps(a, b), [across, unit] = [widthOf(hull(a, b)), heightOf(hull(a, b))];
  const sharedX = -gapX / Math.min(widthOf(a), widthOf(b)), sharedY = -gapY / Math.min(heightOf(a), heightOf(b));
  const lower = Math.min(heightOf(a), heightOf(b)), taller = Math.max(heightOf(a), heightOf(b));

  const isInside = sharedX > 0.6 && sharedY > 0.6;
  const areFragments = taller < TALL * unit; // neither is as high as both
  const isBroken = Math.max(gapX, gapY) <= (areFragments ? 3 : 1) * NEAR * height;
  const isStacked = sharedX > 0.4 && sharedY < 0.5 && gapY <= STACK_GAP * height;
  const isBarOfFive = Math.max(gapX, gapY) <= BAR_GAP * height &&
    widthOf(b) > Math.max(heightOf(b), BAR * height) && b[3] <= (a[1] + a[3]) / 2;
  const isOpenFour = gapX <= OPEN_GAP * unit &&
    heightOf(a) >= 0.35 * unit && heightOf(b) >= 0.6 * unit && widthOf(b) <= OPEN_STEM * unit &&
    a[3] <= b[3] - 0.25 * unit && a[1] <= b[1] + 0.3 * unit && sharedY > 0.1;
  const areDots = Math.max(longerSide(a), longerSide(b)) <= DOT * height; // a colon's
  const isOne = isInside || isBroken || isOpenFour || ((isStacked || isBarOfFive) && !areDots);
  const areTwoDigits = lower > TALL * unit;
  const fits = across <= 1.2 * Math.max(height, taller);
  return isOne && !areTwoDigits && fits && a[0] <= b[0];
}

/** Lines from the top, each from the left, as indices of the boxes. A line may climb or fall. */
function readingOrder(boxes) {
  const lines = [];
  const middle = (i) => [(boxes[i][0] + boxes[i][2]) / 2, (boxes[i][1] + boxes[i][3]) / 2];
  for (const i of [...boxes.keys()].sort((i, j) => middle(i)[0] - middle(j)[0])) {
    const shared = lines.map((line) => {
      const end = boxes[line.at(-1)];
      return -gaps(end, boxes[i])[1] / Math.min(heightOf(end), heightOf(boxes[i]));
    });
    const most = Math.max(...shared);
    if (most > 0.4) lines[shared.indexOf(most)].push(i);
    else lines.push([i]);
  }
  let [width, rise] = [0, 0];
  for (const line of lines) {
    const [[left, from], [right, to]] = [middle(line[0]), middle(line.at(-1))];
    [width, rise] = [width + right - left, rise + to - from];
  }
  const slope = width ? rise / width : 0;
  const level = (line) => line.reduce((sum, i) => sum + middle(i)[1] - slope * middle(i)[0], 0) / line.length;
  return lines.sort((a, b) => level(a) - level(b)).flat();
}
