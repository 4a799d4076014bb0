// Each head's attention from the chosen token, and with MoBA the gate of each block.
const CELL = 3; // pixels that a key has at least; in a longer text several keys share a cell
const DIGIT = 8; // pixels that a digit below a block takes at most
function drawAttention() {
  const L = S.layers[layer],
    title = `Attention of ${L.name}`,
    none = missing(L);
  if (none) {
    fill("attention", title, none);
    return;
  }
  const width = $("attention").clientWidth - 40,
    cells = Math.max(1, Math.min(token + 1, Math.floor(width / CELL)));
  const perCell = Math.ceil((token + 1) / cells);
  const what = L.block_size
    ? paragraph(
        "MoBA: each head reads the token's own block and ",
        L.topk === 1
          ? "no other"
          : L.topk === 2
            ? "the earlier block whose gate is largest"
            : `the ${L.topk - 1} earlier blocks whose gates are largest`,
        `. The gate of a block of ${plural(L.block_size, "token")} is the product of the query with the ` +
          `block's mean key, q·k̄, written below the block where there is room. `,
        make("b", "", "Filled: read. Empty: not read. Thick outline: own block, read without a gate. "),
      )
    : paragraph("Full attention: each head reads every token up to the chosen one. ");
  what.append(
    "Above, the attention of ",
    quote(R.tokens[token]),
    " to the tokens from the first (left) to itself (right), relative to the head's largest weight",
    perCell > 1 ? `; a cell shows the largest of ${perCell} tokens` : "",
    ". Choose a cell to take its logit apart.",
  );
  const heads = Array.from({ length: L.heads }, (_, h) => headOf(L, h, perCell, width / (token + 1)));
  fill("attention", title, what, ...heads);
}
function headOf(L, h, perCell, pixels) {
  const row = weights(L, h, token),
    best = row.indexOf(row.reduce((a, b) => Math.max(a, b), 0)),
    label = make("span");
  label.append(`head ${h}: most at `, quote(R.tokens[best]), ` (token ${best}, ${percent(row[best])})`);
  const head = make("div", "head", label, stripOf(L, h, row, best, perCell));
  if (L.block_size) head.append(blocksOf(L, h, pixels));
  return head;
}
function stripOf(L, h, row, best, perCell) {
  const strip = make("div", "strip");
  for (let from = 0; from <= token; from += perCell) {
    let j = from;
    for (let next = from; next < from + perCell && next <= token; next++) if (row[next] > row[j]) j = next;
    const cell = make("i");
    cell.style.background = `rgba(var(--ink),${Math.sqrt(row[j] / row[best]).toFixed(3)})`;
    cell.style.flexGrow = Math.min(perCell, token + 1 - from);
    cell.title = `token ${j} ${shown(R.tokens[j])}: ${reads(L, h, token, j) ? percent(row[j]) : "not read"}`;
    cell.onclick = () => chooseKey(j);
    strip.append(cell);
  }
  return image(strip, `head ${h}: most attention to token ${best}, ${percent(row[best])}`);
}
// `pixels`: the width of one token.
function blocksOf(L, h, pixels) {
  const own = Math.floor(token / L.block_size),
    row = make("div", "blocks"),
    read = [];
  for (let b = 0; b <= own; b++) {
    const is = readsBlock(L, h, token, b),
      tokens = Math.min(L.block_size, token + 1 - b * L.block_size),
      gate = b === own ? "own" : plain(blockGate(L, h, token, b), 2);
    const fits = gate.length * DIGIT <= tokens * pixels; // part of a number would be another number
    const block = make("span", is ? "read" : "", make("i"), fits ? gate : "");
    block.style.flex = `${tokens} 1 0`;
    block.title = b === own ? `block ${b}: the token's own` : `block ${b}: gate ${gate}, ${is ? "read" : "not read"}`;
    if (b === own) block.classList.add("own");
    if (is) read.push(b);
    row.append(block);
  }
  return image(row, `head ${h} reads blocks ${read.join(", ")} of 0 to ${own}`);
}
