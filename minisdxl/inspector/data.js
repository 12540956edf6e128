"use strict";
// Reads the numbers that minisdxl/inspector/packing.py has packed.

function bytes(base64) {
  const text = atob(base64);
  const found = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) found[i] = text.charCodeAt(i);
  return found;
}

function bitsOf(base64, count) {
  const packed = bytes(base64);
  return Uint8Array.from({ length: count }, (_, i) => (packed[i >> 3] >> (i & 7)) & 1);
}

function wholeOf(base64) {
  const packed = bytes(base64);
  return Uint16Array.from({ length: packed.length / 2 }, (_, i) => packed[2 * i] + 256 * packed[2 * i + 1]);
}

// The value that a step from 0 to `last` stands for.
function unscaled(step, last, ends) {
  if (ends.log) return ends.low * Math.pow(ends.high / ends.low, step / last);
  return ends.low + ((ends.high - ends.low) * step) / last;
}

function scaledOf(packed) {
  const table = Float64Array.from({ length: 256 }, (_, step) => unscaled(step, 255, packed));
  return Float64Array.from(bytes(packed.data), (step) => table[step]);
}

// Steps of scores, all different, so that ranks can be read from them.
function rankedOf(packed) {
  const steps = wholeOf(packed.data);
  const order = Array.from(steps.keys()).sort((a, b) => steps[b] - steps[a]);
  const ranks = new Uint32Array(steps.length);
  order.forEach((token, rank) => (ranks[token] = rank + 1));
  return { values: Float64Array.from(steps, (step) => unscaled(step, 65535, packed)), ranks };
}

// One layer's reduction, unpacked: for each of `count` positions whether a token was there (held) and stayed (kept), its
// score and rank, and where it is copied from. `scores` and `sources` are null where the plan has none.
function reductionOf(packed, count) {
  const kept = bitsOf(packed.kept, count);
  const held = packed.held ? bitsOf(packed.held, count) : new Uint8Array(count).fill(1);
  let scores = null, ranks = null, sources = null;
  if (packed.scores) {
    const found = rankedOf(packed.scores);
    scores = new Float64Array(count).fill(NaN);
    ranks = new Uint32Array(count);
    let next = 0;
    for (let i = 0; i < count; i++) if (held[i]) { scores[i] = found.values[next]; ranks[i] = found.ranks[next++]; }
  }
  if (packed.sources) {
    const found = wholeOf(packed.sources);
    sources = Array.from({ length: count }, () => []);
    let next = 0;
    for (let i = 0; i < count; i++) {
      if (held[i] && !kept[i]) for (let j = 0; j < packed.each; j++) sources[i].push(found[next++]);
    }
  }
  return { layer: packed.layer, kept, held, scores, ranks, sources, stay: kept.reduce((a, b) => a + b, 0) };
}

// Largest weights of each token: `of(token)` is a list of [position, weight].
function topOf(packed) {
  const positions = wholeOf(packed.positions);
  const weights = scaledOf(packed);
  const each = packed.each;
  return (token) => Array.from({ length: each }, (_, i) => [positions[token * each + i], weights[token * each + i]]);
}

function attentionOf(packed) {
  return {
    rows: topOf(packed.rows),
    columns: topOf(packed.columns),
    words: { grid: packed.words.grid, values: scaledOf(packed.words) },
    iterations: packed.iterations,
    scores: scaledOf(packed.scores),
  };
}
