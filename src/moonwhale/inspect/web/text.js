// The text, whose tokens are buttons, and the buttons of the layers.
function drawText() {
  const text = make("div", "text");
  text.id = "text";
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", "Tokens");
  text.onkeydown = moveByKey;
  text.replaceChildren(
    ...R.tokens.map((text, i) => {
      const b = button(shown(text), () => choose(i), i >= R.prompt_tokens ? "answer" : "");
      const first = S.guesses[i].find((g) => g.depth === 1);
      if (first) b.append(make("sup", first.held ? "good" : "bad", first.held ? "✓" : "✗"));
      b.title = i ? `token ${i}, surprise ${S.surprise[i - 1].toFixed(2)} nats` : "token 0";
      return b;
    }),
  );
  const marks = MODULES
    ? " ✓: the first MTP module guessed this token, one token ahead of the main model. ✗: it guessed another one."
    : "";
  fill(
    "tokens",
    "Text: choose a token",
    paragraph(`The model wrote the underlined tokens.${marks} The arrow keys move between tokens.`),
    text,
  );
  markText();
}
function markText() {
  for (const [i, b] of [...$("text").children].entries()) {
    b.setAttribute("aria-pressed", i === token);
    b.classList.toggle("key", i === key && key !== token);
    b.tabIndex = i === token ? 0 : -1;
  }
}
function moveByKey(event) {
  const by = { ArrowRight: 1, ArrowLeft: -1, Home: -T, End: T }[event.key];
  if (!by || event.altKey || event.ctrlKey || event.metaKey) return; // Alt with an arrow goes to another page
  event.preventDefault();
  choose(Math.max(0, Math.min(T - 1, token + by)));
  $("text").children[token].focus();
}
function choose(i) {
  token = i;
  key = Math.min(key, token);
  markText();
  const text = $("text"),
    chosen = text.children[token].getBoundingClientRect(),
    box = text.getBoundingClientRect();
  if (chosen.top < box.top || chosen.bottom > box.bottom) text.scrollTop += chosen.top - box.top - box.height / 2;
  drawPredictions();
  drawLayer();
}

function drawLayers() {
  $("layers").replaceChildren(
    ...S.layers.map((L, i) => {
      const b = button(L.name, () => chooseLayer(i));
      b.setAttribute("aria-pressed", i === layer);
      return b;
    }),
  );
}
function chooseLayer(i) {
  layer = i;
  for (const [j, b] of [...$("layers").children].entries()) b.setAttribute("aria-pressed", j === layer);
  drawLayer();
}
function drawLayer() {
  drawExperts();
  drawLogit();
  drawAttention();
  drawLargest();
  moveCursor();
}

// What a panel says instead of its figure where nothing was recorded, or null.
function missing(L) {
  if (token >= L.counted) {
    return paragraph(
      `${L.name} also reads a token after the chosen one, and the text ends before it. The last ` +
        `${plural(T - L.counted, "token")} of the text have no part in this module.`,
    );
  }
  if (token < S.first) {
    return paragraph(
      `So long a text would make the file too large: scores and logits are kept for the last ` +
        `${plural(T - S.first, "token")} only. Choose token ${S.first} or a later one.`,
    );
  }
  return null;
}
