"use strict";
/* What an answer is worth, as confidence.py computes it: whether an image is like any digit at all. */

/**
 * The logits of a normalised image, and the vectors that `isStrange` looks at: the mean token after a
 * third, two thirds and all of the blocks.
 */
function readImage(model, image) {
  const depth = model.blocks.length, D = model.norm.weight.length, vectors = [];
  const chosen = new Set([1, 2, 3].map((part) => Math.ceil(depth * part / 3)));
  let x = model.embed(image);
  model.blocks.forEach((block, i) => {
    x = block.forward(x);
    if (chosen.has(i + 1)) vectors.push(meanToken(x, D));
  });
  return { logits: model.head.forward(model.pooled(x)), vectors };
}

/**
 * Whether an image lies further from every class than 99 % of the validation images do: the squared
 * Mahalanobis distance to the nearest class mean, summed over the blocks (Lee et al., 2018).
 *
 * `whitening` has (D, D) for each block, `centres` (classes, D); without `threshold` nothing is strange.
 */
function isStrange(vectors, { threshold, whitening, centres }) {
  if (threshold === undefined) return false;
  const D = vectors[0].length, matrix = whitening.length / vectors.length, means = centres.length / vectors.length;
  let strangeness = 0;
  vectors.forEach((vector, block) => {
    const white = linear(vector, whitening.subarray(block * matrix, (block + 1) * matrix), new Float32Array(D));
    let least = Infinity;
    for (let start = block * means; start < (block + 1) * means; start += D) {
      least = Math.min(least, white.reduce((sum, value, i) => sum + (value - centres[start + i]) ** 2, 0));
    }
    strangeness += least;
  });
  return strangeness > threshold;
}
