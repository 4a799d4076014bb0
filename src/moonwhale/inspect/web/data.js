"use strict";
// The recordings, and what follows from them. A recording is one forward pass with some settings.
const R = JSON.parse(document.getElementById("recorded").textContent);
const T = R.tokens.length;
const MODULES = R.recordings[0].predictions.length - 1;

const decode = (text, Kind) => new Kind(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
function unpack(recording) {
  for (const L of recording.layers) {
    L.content = decode(L.content, Int16Array);
    L.rotary = decode(L.rotary, Int16Array);
    if (L.blocks) {
      L.blocks = decode(L.blocks, Uint8Array);
      L.block_gates = decode(L.block_gates, Float32Array);
      L.count = Math.ceil(T / L.block_size);
    }
    if (L.experts) {
      L.gates = decode(L.gates, Float32Array);
      L.scores = decode(L.scores, Float32Array);
    }
  }
  return recording;
}
R.recordings.forEach(unpack);

// What the page shows
let S = R.recordings[0]; // the recording
let layer = 0;
let token = Math.min(T - 1, Math.max(R.prompt_tokens, S.first)); // also the query of attention
let key = Math.max(0, token - 1); // the key of the logit that is taken apart

// Logits are kept of queries from S.first on, row by row, each row with its keys up to the query.
const pairsBefore = (query) => (query * (query + 1) - S.first * (S.first + 1)) / 2;
function logit(L, head, query, key) {
  const at = head * pairsBefore(T) + pairsBefore(query) + key;
  const content = L.content[at] * L.step[head],
    rotary = L.rotary[at] * L.step[head];
  return { content, rotary, sum: content + rotary };
}
function readsBlock(L, head, query, block) {
  const bit = (head * T + query) * L.count + block;
  return (L.blocks[bit >> 3] >> (7 - (bit & 7))) & 1;
}
const reads = (L, head, query, key) =>
  key <= query && (!L.blocks || readsBlock(L, head, query, Math.floor(key / L.block_size)) === 1);
const blockGate = (L, head, query, block) => L.block_gates[(head * (T - S.first) + query - S.first) * L.count + block];

// The softmax over the keys that a query reads, one weight for each key up to the query.
function weights(L, head, query) {
  const logits = Float64Array.from({ length: query + 1 }, (_, j) =>
    reads(L, head, query, j) ? logit(L, head, query, j).sum : -Infinity,
  );
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity),
    exps = logits.map((x) => Math.exp(x - largest));
  const total = exps.reduce((a, b) => a + b, 0);
  return exps.map((x) => x / total);
}

// All experts of a token by score + bias: the chosen ones, the others, and last the closed, whose group was left out.
// The bias is counted from the block's smallest, so that a drift of all biases does not dwarf the scores.
function rankedExperts(L, token) {
  const per = L.experts[token].length,
    at = (token - S.first) * L.n_experts,
    chosen = L.experts[token],
    least = Math.min(...L.bias);
  const all = L.bias.map((own, e) => {
    const score = L.scores[at + e],
      bias = own - least,
      place = chosen.indexOf(e);
    return { e, score, bias, sum: score + bias, gate: place < 0 ? null : L.gates[token * per + place], closed: false };
  });
  if (L.groups > 1) {
    const size = L.n_experts / L.groups,
      best = (group) =>
        group
          .map((x) => x.sum)
          .sort((a, b) => b - a)
          .slice(0, 2)
          .reduce((a, b) => a + b, 0);
    const groups = Array.from({ length: L.groups }, (_, g) => all.slice(g * size, (g + 1) * size)).sort(
      (a, b) => best(b) - best(a),
    );
    for (const group of groups.slice(L.topk_groups)) for (const x of group) x.closed = x.gate === null;
  }
  return all.sort((a, b) => (b.gate !== null) - (a.gate !== null) || a.closed - b.closed || b.sum - a.sum);
}
// The experts that the scores alone would choose, without the bias.
function chosenByScore(L, token) {
  const open = rankedExperts(L, token)
    .filter((x) => !x.closed)
    .sort((a, b) => b.score - a.score);
  return new Set(open.slice(0, L.experts[token].length).map((x) => x.e));
}

const mean = (numbers) => numbers.reduce((a, b) => a + b, 0) / numbers.length;
const guessesHeld = (recording) => {
  const tested = recording.guesses.flat().filter((g) => g.depth === 1);
  return { tested: tested.length, held: tested.filter((g) => g.held).length };
};
