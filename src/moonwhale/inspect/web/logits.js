// One logit of each head in its two parts; the largest logit of each head; and the cache.
function chooseKey(j) {
  key = j;
  markText();
  drawLogit();
}
function drawLogit() {
  const L = S.layers[layer],
    title = `A logit of ${L.name}, taken apart`,
    none = missing(L);
  if (none) {
    fill("logit", title, none);
    return;
  }
  const slider = make("input");
  slider.type = "range";
  slider.min = 0;
  slider.max = token;
  slider.value = key;
  slider.id = "key";
  slider.setAttribute("aria-label", "Key token");
  const body = make("div"),
    draw = () => body.replaceChildren(...partsOf(L));
  slider.oninput = () => {
    key = Number(slider.value);
    markText();
    draw();
  };
  draw();
  fill("logit", title, slider, body);
}
function partsOf(L) {
  const heads = Array.from({ length: L.heads }, (_, h) => ({
    ...logit(L, h, token, key),
    weight: weights(L, h, token)[key],
    read: reads(L, h, token, key),
  }));
  const most = Math.max(...heads.flatMap((x) => [Math.abs(x.content), Math.abs(x.rotary), Math.abs(x.sum)]), 1e-9);
  const at = (x) => 0.5 + x / most / 2,
    list = make("div");
  heads.forEach((x, h) => {
    const content = make("div", "track", span(at(0), at(x.content)), span(0.5, 0.5, "zero"));
    const rotary = make("div", "track", span(at(0), at(x.rotary), "alt"), span(0.5, 0.5, "zero"));
    const numbers = `${plain(x.content, 2)} ${signed(x.rotary, 2)} = ${plain(x.sum, 2)}`;
    list.append(
      make(
        "div",
        "parts",
        `head ${h}`,
        make("div", "", content, rotary),
        make("span", "n", numbers),
        make("span", "n", x.read ? percent(x.weight) : "not read"),
      ),
    );
  });
  return [
    paragraph(
      "Query ",
      quote(R.tokens[token]),
      ` (token ${token}), key `,
      quote(R.tokens[key]),
      ` (token ${key}), ${plural(token - key, "position")} apart.`,
    ),
    paragraph(
      "A logit is the sum of a ",
      legend("content part"),
      ", from the latent, and a ",
      legend("rotary part", "alt"),
      ", the only one that knows the distance. At the right is the softmax's weight.",
    ),
    list,
  ];
}

function drawLargest() {
  const L = S.layers[layer],
    tau = R.facts.tau,
    most = Math.max((tau ?? 0) * 1.05, 1, ...L.largest);
  const line = tau
    ? () => {
        const e = make("i", "tau");
        e.style.left = `${(100 * tau) / most}%`;
        return e;
      }
    : null;
  fill(
    "logits",
    `Largest logit of each head in ${L.name}`,
    paragraph(
      tau
        ? `In training, QK-clip scaled a head down once one of its logits exceeded τ = ${tau} (dashed line). In this text:`
        : tau === 0
          ? "This model was trained without QK-clip. In this text:"
          : "QK-clip scales a head down once one of its logits exceeds a threshold τ. The model's folder has no " +
            "run.yaml that says which. In this text:",
    ),
    bars(
      L.largest.map((x, h) => ({ name: `head ${h}`, value: x, label: plain(x, 1) })),
      most,
      line,
    ),
  );
}

function drawCache() {
  const F = R.facts,
    kb = (x) => (x >= 1e6 ? (x / 1e6).toFixed(1) + " MB" : (x / 1e3).toFixed(1) + " kB");
  fill(
    "cache",
    "Cache of this text",
    paragraph(
      `Each token adds one latent of ${F.rank} values and one rotary key of ${F.rope} to the cache of each ` +
        `main block, shared by all ${F.heads} heads. Multi-head attention would store a key and a value for ` +
        `each head. In bf16, for ${T} tokens:`,
    ),
    bars(
      [
        ["latent", F.latent_bytes],
        ["multi-head", F.plain_bytes],
      ].map(([name, n]) => ({ name, value: n, label: kb(n * T) })),
      F.plain_bytes,
    ),
    paragraph(
      make("b", "", (F.plain_bytes / F.latent_bytes).toFixed(1) + " times smaller"),
      ` (${F.latent_bytes} instead of ${F.plain_bytes} bytes per token).`,
    ),
  );
}
