// A tour of six stops for a reader of the papers. Each stop goes to a place in this text that shows its mechanism.
const STOPS = [
  {
    title: "One latent for all heads (MLA)",
    panel: "cache",
    go() {},
    text: () =>
      `DeepSeek-V2 §2.1: keys and values of all heads are linear maps of one latent c. Only c and one rotary ` +
      `key are cached, ${R.facts.latent_bytes} instead of ${R.facts.plain_bytes} bytes per token here. ` +
      `Absorbed into the query, W_UK lets decoding score the latents themselves.`,
  },
  {
    title: "Position is a summand (decoupled RoPE)",
    panel: "logit",
    go() {
      chooseLayer(0);
      choose(Math.max(S.first, S.layers[0].counted - 1));
      const L = S.layers[0],
        keys = Array.from({ length: token + 1 }, (_, j) => j);
      const rotary = (j) => Math.max(...Array.from({ length: L.heads }, (_, h) => Math.abs(logit(L, h, token, j).rotary)));
      chooseKey(keys.reduce((a, j) => (rotary(j) > rotary(a) ? j : a), 0));
    },
    text: () =>
      "A rotation between W_UQ and W_UK would keep them from being absorbed. So V2 gives a logit a second, " +
      "rotary part, whose key all heads share. Move the slider: the content part follows the words, the " +
      "rotary part the distance. This is the key with the largest rotary part.",
  },
  {
    title: "A gate chooses blocks (MoBA)",
    panel: "attention",
    go() {
      const at = S.layers.findIndex((L) => L.blocks);
      if (at < 0) return;
      chooseLayer(at);
      choose(S.layers[at].counted - 1);
    },
    text() {
      const L = S.layers.find((one) => one.blocks);
      if (!L)
        return (
          "MoBA (arXiv 2502.13189) lets each query read its own block and a few earlier ones. This model has " +
          "no MoBA: all heads read everything, as the strips show."
        );
      const few =
        L.count <= L.topk
          ? ` This text has ${plural(L.count, "block")}, so nothing is left out: take a longer one to see a choice.`
          : "";
      return (
        `MoBA (arXiv 2502.13189): without a parameter, the gate q·k̄ picks ${plural(L.topk, "block")} of ` +
        `${L.block_size} tokens for each query and head, its own included. Below each strip are the blocks and their gates. ` +
        `Look for heads that pick different blocks, and compare a block's gate with the attention inside ` +
        `it.${few}`
      );
    },
  },
  {
    title: "The bias moves the cut (DeepSeekMoE)",
    panel: "experts",
    go() {
      const found = swayedByBias();
      if (!found) return;
      chooseLayer(found.layer);
      choose(found.token);
    },
    text() {
      if (!S.layers.some((L) => L.experts))
        return (
          "DeepSeekMoE replaces the feed-forward network by many small experts. This model has none: every " +
          "token passes one dense network."
        );
      const found = swayedByBias();
      return (
        `V3 §2.1.2: after each step an overloaded expert's bias falls by γ = ${R.facts.bias_speed}, an idle ` +
        `one's rises. The bias decides who is above the dashed cut, but the gates do not see it. ` +
        `${found?.swayed ? "Here it changed the choice." : "In this text it changed no choice."}`
      );
    },
  },
  {
    title: "Two tokens at once (MTP)",
    panel: "next",
    go() {
      const held = S.guesses.findIndex((list, i) => i >= R.prompt_tokens && list.some((g) => g.held));
      if (held >= 2) choose(held - 2);
    },
    text: () =>
      MODULES
        ? "V3 §2.2: module k reads the state of the previous head and the embedding of token i + k, and " +
          "predicts token i + k + 1 with the same output matrix. In training this densifies the loss. In " +
          "decoding it drafts: a ✓ in the text is a token for which a draft can save a pass. Compare how sure " +
          "each head is."
        : "V3 §2.2 adds modules that predict further tokens. This model has none, so there is one prediction for each token.",
  },
  {
    title: "Large logits, clipped (MuonClip)",
    panel: "logits",
    go() {
      const tops = S.layers.map((L) => Math.max(...L.largest));
      chooseLayer(tops.indexOf(Math.max(...tops)));
    },
    text: () =>
      `Kimi K2 §2.1: Muon lets attention logits grow. QK-clip shrinks W_UQ, W_QR and W_UK of each head whose ` +
      `largest logit exceeded τ${R.facts.tau ? ` = ${R.facts.tau}` : ""}, and leaves the shared rotary key ` +
      `alone. This layer has the largest logit in this text. The last panel tells what fewer experts or ` +
      `smaller blocks cost in nats.`,
  },
];
let stop = -1;

// The first choice that the bias changed; if there is none, the first routed token.
function swayedByBias() {
  const candidates = S.layers.map((L, i) => ({ L, i })).filter(({ L }) => L.experts && L.counted > S.first);
  for (const { L, i } of candidates) {
    for (let t = S.first; t < L.counted; t++) {
      const byScore = chosenByScore(L, t);
      if (L.experts[t].some((e) => !byScore.has(e))) return { layer: i, token: t, swayed: true };
    }
  }
  return candidates.length
    ? { layer: candidates[0].i, token: Math.max(S.first, Math.min(token, candidates[0].L.counted - 1)), swayed: false }
    : null;
}
function goTo(i) {
  for (const panel of document.querySelectorAll("section.shown")) panel.classList.remove("shown");
  stop = i;
  $("tour").hidden = stop < 0;
  if (stop < 0) {
    $("start-tour").focus();
    return;
  }
  const { title, panel, go, text } = STOPS[stop],
    back = button("Back", () => goTo(stop - 1)),
    next = button(stop + 1 < STOPS.length ? "Next" : "Finish", () => goTo(stop + 1 < STOPS.length ? stop + 1 : -1));
  back.disabled = stop === 0;
  go();
  $("tour").replaceChildren(
    make("h2", "", `${stop + 1} of ${STOPS.length}: ${title}`),
    paragraph(text()),
    make(
      "nav",
      "",
      back,
      next,
      button("End", () => goTo(-1)),
    ),
  );
  $(panel).classList.add("shown");
  $(panel).scrollIntoView({
    block: "start",
    behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth",
  });
  next.focus({ preventScroll: true });
}
$("start-tour").onclick = () => goTo(0);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && stop >= 0) goTo(-1);
});
