// All experts of the chosen token: score, bias, the cut line of top-k, and gates. Below, the load of each expert.
function drawExperts() {
  const L = S.layers[layer],
    title = `Experts of ${L.name}`;
  $("experts").classList.toggle("wide", (L.n_experts ?? 0) > 16);
  if (!L.experts) {
    fill(
      "experts",
      title,
      paragraph("This block has one dense feed-forward network for all tokens, so there is nothing to route."),
    );
    return;
  }
  const none = missing(L);
  fill("experts", title, ...(none ? [none] : routed(L)), ...load(L));
}
function routed(L) {
  const ranked = rankedExperts(L, token),
    k = L.experts[token].length,
    byScore = chosenByScore(L, token);
  const most = Math.max(...ranked.map((x) => Math.max(x.score, x.sum)), 1e-9),
    list = make("div", "scores");
  ranked.forEach((x, place) => {
    if (place === k) list.append(make("div", "cut", `top-${k} cut at ${plain(ranked[k - 1].sum, 3)}`));
    if (x.closed && !ranked[place - 1].closed) list.append(make("div", "cut", "not considered: groups left out"));
    const track = make("div", "track", span(0, x.score / most), span(x.score / most, x.sum / most, "alt"));
    const numbers = `${plain(x.score, 3)} ${signed(x.bias, 3)} = ${plain(x.sum, 3)}`;
    const name = make(x.gate === null ? "span" : "b", "", `E${x.e}`),
      row = make("div", x.gate === null ? "expert" : "expert taken", name, track, make("span", "n", numbers));
    row.title = x.gate !== null ? `gate ${x.gate.toFixed(3)}` : x.closed ? "its group was not chosen" : "not chosen";
    list.append(row);
  });
  const swayed = ranked
    .slice(0, k)
    .filter((x) => !byScore.has(x.e))
    .map((x) => `E${x.e}`);
  const closed = ranked.filter((x) => x.closed).length;
  const gates = ranked
    .slice(0, k)
    .map((x) => `E${x.e} ${x.gate.toFixed(3)}`)
    .join(", ");
  const shared = R.facts.shared_experts
    ? ` ` +
      `${R.facts.shared_experts === 1 ? "A shared expert processes" : `${R.facts.shared_experts} shared experts process`} ` +
      `every token as well.`
    : "";
  return [
    paragraph(
      "The router scores all experts for ",
      quote(R.tokens[token]),
      ` and takes the ${k} with the largest sum of `,
      legend(`${R.facts.scoring} score`),
      " and ",
      legend("bias", "alt"),
      ". The bias only balances the load; gates are made of the scores alone. Only differences of the bias matter to " +
        `top-${k}, so it is drawn from the block's smallest.`,
    ),
    list,
    paragraph(
      make("b", "", `Gates: ${gates}.`),
      shared,
      swayed.length
        ? ` ${swayed.join(" and ")} would not have been chosen without the bias.`
        : " The bias changed nothing for this token.",
      closed
        ? ` ${plural(closed, "expert")} could not be chosen: their groups were not among the best ` +
            `${L.topk_groups} of ${L.groups}.`
        : "",
    ),
  ];
}
function load(L) {
  const tokens = Array(L.n_experts).fill(0);
  for (const row of L.experts.slice(0, L.counted)) for (const e of row) tokens[e]++;
  if (!L.counted) return [];
  const even = (L.counted * L.experts[0].length) / L.n_experts;
  const list = make("div", "scores");
  tokens.forEach((n, e) =>
    list.append(
      make(
        "div",
        "expert",
        `E${e}`,
        make("div", "track", span(0, n / Math.max(...tokens))),
        make("span", "n", plural(n, "token")),
      ),
    ),
  );
  return [paragraph(`Tokens of this text that each expert processed (${even.toFixed(0)} each if balanced):`), list];
}
