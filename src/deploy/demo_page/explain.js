"use strict";
/* Where the network looked, as explain.py computes it: attention rollout over the image that it read last. */

/**
 * How much of each input token reaches each token of the last block, T rows of T shares.
 *
 * The heads are averaged to A, the residual connection is given the same weight, 0.5 A + 0.5 I, and these
 * matrices are multiplied from the first block to the last (Abnar & Zuidema, 2020, section 3).
 */
function rollout(model) {
  let total = null;
  for (const { attn } of model.blocks) {
    const T = attn.weights.length / attn.num_heads;
    const flow = Array.from({ length: T }, (_, t) => {
      const row = new Float32Array(T);
      for (let head = 0; head < attn.num_heads; head++) {
        attn.weights[head * T + t].forEach((weight, s) => { row[s] += 0.5 * weight / attn.num_heads; });
      }
      row[t] += 0.5;
      return row;
    });
    total = total ? flow.map((row) => mixRows(row, total)) : flow;
  }
  return total;
}

/** The sum of the rows, each times its weight. */
function mixRows(weights, rows) {
  const sum = new Float32Array(rows[0].length);
  rows.forEach((row, i) => { for (let j = 0; j < row.length; j++) sum[j] += weights[i] * row[j]; });
  return sum;
}

/**
 * A rollout as a map, rows of patches: how much the head's input takes from each. That is the row of CLS
 * without its own column, or, with the pool "mean", the mean of all rows.
 */
function patchMap(rows, model) {
  const isCls = model.pool === "cls";
  const shares = isCls ? rows[0].subarray(1) : mixRows(rows.map(() => 1 / rows.length), rows);
  const side = Math.sqrt(shares.length);
  return Array.from({ length: side }, (_, row) => [...shares.subarray(row * side, (row + 1) * side)]);
}
