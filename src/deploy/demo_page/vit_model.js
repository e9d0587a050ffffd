"use strict";
/*
 * The network of vit_model.py, trained, for one image at a time: its classes and steps by their names there.
 *
 * A tensor is a Float32Array, row by row. In the comments on shapes
 *
 *     S: img_size, 28     N: patches of an image             D: embed_dim, the width of a token
 *                         T: tokens, N + 1 with CLS          H: attention heads, each D / H wide
 *
 * `state` is the model's state_dict: its tensors by their names in PyTorch.
 */

/**
 * x weight^T + bias: (rows, inner), (columns, inner), (columns) -> (rows, columns).
 *
 * Nearly all of the time is spent here. Each number that is read serves several products: two rows
 * and four columns at a time, whose eight sums the processor keeps at hand. Where the rows or the
 * columns don't divide, the last of them is computed again.
 */
function linear(x, weight, bias) {
  const columns = bias.length, inner = weight.length / columns, rows = x.length / inner;
  const out = new Float32Array(rows * columns);
  for (let r = 0; r < rows; r += 2) {
    const s = Math.min(r + 1, rows - 1), xr = r * inner, xs = s * inner;
    for (let a = 0; a < columns; a += 4) {
      const b = Math.min(a + 1, columns - 1), c = Math.min(a + 2, columns - 1), d = Math.min(a + 3, columns - 1);
      const wa = a * inner, wb = b * inner, wc = c * inner, wd = d * inner;
      let ra = bias[a], rb = bias[b], rc = bias[c], rd = bias[d];
      let sa = ra, sb = rb, sc = rc, sd = rd;
      for (let i = 0; i < inner; i++) {
        const first = x[xr + i], second = x[xs + i];
        const toA = weight[wa + i], toB = weight[wb + i], toC = weight[wc + i], toD = weight[wd + i];
        ra += first * toA; rb += first * toB; rc += first * toC; rd += first * toD;
        sa += second * toA; sb += second * toB; sc += second * toC; sd += second * toD;
      }
      const outR = r * columns, outS = s * columns;
      out[outR + a] = ra; out[outR + b] = rb; out[outR + c] = rc; out[outR + d] = rd;
      out[outS + a] = sa; out[outS + b] = sb; out[outS + c] = sc; out[outS + d] = sd;
    }
  }
  return out;
}

/** Numbers to shares: e^x / sum of e^x. */
function softmax(x) {
  const largest = Math.max(...x), powers = x.map((value) => Math.exp(value - largest));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => power / sum);
}

/** The error function, to 2e-7 (Abramowitz & Stegun, 1964, formula 7.1.26). */
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const sum = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return Math.sign(x) * (1 - sum * Math.exp(-x * x));
}

const gelu = (x) => x.map((value) => 0.5 * value * (1 + erf(value * Math.SQRT1_2)));
const add = (x, y) => x.map((value, i) => value + y[i]);

class Linear {
  constructor(state, name) {
    [this.weight, this.bias] = [state[`${name}.weight`], state[`${name}.bias`]];
  }

  forward(x) {
    return linear(x, this.weight, this.bias);
  }
}

/** Each token, less its mean, over its standard deviation: (T, D) -> (T, D). */
class LayerNorm {
  constructor(state, name) {
    [this.weight, this.bias] = [state[`${name}.weight`], state[`${name}.bias`]];
  }

  forward(x) {
    const D = this.weight.length, out = new Float32Array(x.length);
    for (let start = 0; start < x.length; start += D) {
      let mean = 0, variance = 0;
      for (let i = 0; i < D; i++) mean += x[start + i] / D;
      for (let i = 0; i < D; i++) variance += (x[start + i] - mean) ** 2 / D;
      const scale = 1 / Math.sqrt(variance + 1e-6);
      for (let i = 0; i < D; i++) out[start + i] = (x[start + i] - mean) * scale * this.weight[i] + this.bias[i];
    }
    return out;
  }
}

/** Cut the image into square patches and project each linearly to a token: (S, S) -> (N, D). */
class PatchEmbed {
  constructor({ img_size, patch_size }, state) {
    [this.img_size, this.patch_size] = [img_size, patch_size];
    this.proj = new Linear(state, "patch_embed.proj");
  }

  forward(x) {
    const [S, P] = [this.img_size, this.patch_size], patches = [];
    for (let top = 0; top < S; top += P) {
      for (let left = 0; left < S; left += P) {
        for (let row = top; row < top + P; row++) patches.push(...x.subarray(row * S + left, row * S + left + P));
      }
    }
    return this.proj.forward(Float32Array.from(patches));
  }
}

/** Multi-head self-attention, softmax(q k^T / sqrt(D / H)) v in each head: (T, D) -> (T, D). */
class Attention {
  constructor(num_heads, state, name) {
    this.num_heads = num_heads;
    [this.in_proj_weight, this.in_proj_bias] = [state[`${name}.in_proj_weight`], state[`${name}.in_proj_bias`]];
    this.out_proj = new Linear(state, `${name}.out_proj`);
  }

  forward(x) {
    const H = this.num_heads, D = this.out_proj.bias.length, T = x.length / D, width = D / H;
    const qkv = linear(x, this.in_proj_weight, this.in_proj_bias); // (T, 3D): of each token q, k and v
    const mixed = new Float32Array(T * D);
    this.weights = []; // of the last image, (H * T, T); explain.js shows them
    for (let head = 0; head < H; head++) {
      for (let t = 0; t < T; t++) {
        const q = 3 * D * t + head * width, scores = new Float32Array(T), out = D * t + head * width;
        for (let s = 0; s < T; s++) {
          const k = 3 * D * s + D + head * width;
          let product = 0;
          for (let i = 0; i < width; i++) product += qkv[q + i] * qkv[k + i];
          scores[s] = product / Math.sqrt(width);
        }
        const weights = softmax(scores);
        for (let s = 0; s < T; s++) {
          const v = 3 * D * s + 2 * D + head * width;
          for (let i = 0; i < width; i++) mixed[out + i] += weights[s] * qkv[v + i];
        }
        this.weights.push(weights);
      }
    }
    return this.out_proj.forward(mixed);
  }
}

/** A pre-norm encoder block: x + attention(norm(x)), then x + MLP(norm(x)): (T, D) -> (T, D). */
class TransformerBlock {
  constructor(num_heads, state, name) {
    this.norm1 = new LayerNorm(state, `${name}.norm1`);
    this.attn = new Attention(num_heads, state, `${name}.attn`);
    this.norm2 = new LayerNorm(state, `${name}.norm2`);
    this.mlp = [new Linear(state, `${name}.mlp.0`), new Linear(state, `${name}.mlp.3`)];
  }

  forward(x) {
    const [expand, shrink] = this.mlp;
    x = add(x, this.attn.forward(this.norm1.forward(x)));
    return add(x, shrink.forward(gelu(expand.forward(this.norm2.forward(x)))));
  }
}

class ViT {
  constructor(config, state) {
    this.pool = config.pool;
    this.patch_embed = new PatchEmbed(config, state);
    this.cls_token = state.cls_token ?? []; // none with the pool "mean"
    this.pos_embed = state.pos_embed;
    this.blocks = Array.from({ length: config.depth }, (_, i) =>
      new TransformerBlock(config.num_heads, state, `blocks.${i}`));
    this.norm = new LayerNorm(state, "norm");
    this.head = new Linear(state, "head");
  }

  /** The tokens that the first block reads: a normalised image (S, S) -> (T, D). */
  embed(x) {
    x = this.patch_embed.forward(x); // (N, D)
    return add(Float32Array.from([...this.cls_token, ...x]), this.pos_embed);
  }

  /** What the head reads of the last block's tokens: (T, D) -> (D). */
  pooled(x) {
    x = this.norm.forward(x);
    const D = this.norm.weight.length;
    return this.pool === "cls" ? x.subarray(0, D) : meanToken(x, D);
  }

  /** A normalised image (S, S) -> logits, one for each class. */
  forward(x) {
    x = this.embed(x);
    for (const block of this.blocks) x = block.forward(x);
    return this.head.forward(this.pooled(x));
  }
}

/** (T, D) -> (D). */
function meanToken(x, D) {
  const mean = new Float32Array(D);
  for (let i = 0; i < x.length; i++) mean[i % D] += x[i] * D / x.length;
  return mean;
}
