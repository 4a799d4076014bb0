// The whole text at a glance: for each block of the model, which experts and which MoBA blocks each token used.
function drawMap() {
  const parts = [
    paragraph(
      "Each column is a token. A mark in a row of ",
      legend("experts"),
      " is an expert that the token used, stronger for a larger gate; a mark in a row of ",
      legend("MoBA blocks", "alt"),
      " is a block that it read, stronger for more of the heads. Choose a mark to go there. The red " +
        "line is the chosen token.",
    ),
  ];
  let marks = 0;
  S.layers.forEach((L, i) => {
    if (L.experts) {
      parts.push(band(i, L, `${L.name}: ${L.n_experts} experts`, L.n_experts, "mark-on", expertMarks(L)));
      marks++;
    }
    if (L.blocks && L.count > 1) {
      parts.push(band(i, L, `${L.name}: ${L.count} blocks`, L.count, "mark-alt", blockMarks(L)));
      marks++;
    }
  });
  if (!marks) parts[0] = paragraph("This model has neither experts nor MoBA's blocks: every token takes the same way.");
  else if (!S.layers.some((L) => L.blocks)) parts.push(paragraph("This model has no MoBA."));
  else if (!S.layers.some((L) => L.count > 1))
    parts.push(
      paragraph(
        `The text fits into one MoBA block, so all of it is read. Take a text of more than ` +
          `${S.layers.find((L) => L.blocks).block_size} tokens to see a choice.`,
      ),
    );
  fill("map", "Map of the whole text", ...parts);
  moveCursor();
}
function moveCursor() {
  for (const line of $("map").querySelectorAll(".cursor")) line.setAttribute("x", token + 0.35);
}
function expertMarks(L) {
  const per = L.experts[0].length,
    most = L.gates.reduce((a, b) => Math.max(a, b), 1e-9);
  return L.experts
    .slice(0, L.counted)
    .flatMap((row, i) => row.map((e, n) => ({ i, row: e, strength: L.gates[i * per + n] / most })));
}
function blockMarks(L) {
  const marks = [];
  for (let i = 0; i < L.counted; i++) {
    for (let b = 0; b <= Math.floor(i / L.block_size); b++) {
      let heads = 0;
      for (let h = 0; h < L.heads; h++) heads += readsBlock(L, h, i, b);
      if (heads) marks.push({ i, row: b, strength: heads / L.heads });
    }
  }
  return marks;
}
function band(i, L, label, rows, cls, marks) {
  const figure = svg("svg", { viewBox: `0 0 ${T} ${rows}`, preserveAspectRatio: "none" });
  const most = Math.max(32, 800 / S.layers.length); // pixels, so that many blocks fit on a screen or two
  figure.style.height = `${Math.min(most, Math.max(rows * 7, 14))}px`;
  for (let row = 1; row < rows; row++) figure.append(svg("rect", { x: 0, y: row - 0.03, width: T, height: 0.06, class: "rule" }));
  for (const mark of marks)
    figure.append(
      svg("rect", {
        x: mark.i,
        y: mark.row + 0.05,
        width: 1,
        height: 0.9,
        class: cls,
        opacity: (0.3 + 0.7 * mark.strength).toFixed(2),
      }),
    );
  figure.append(svg("rect", { y: 0, width: Math.max(0.3, T / 400), height: rows, class: "cursor" }));
  figure.onclick = (event) => {
    const box = figure.getBoundingClientRect();
    chooseLayer(i);
    choose(Math.max(0, Math.min(T - 1, Math.floor((T * (event.clientX - box.left)) / box.width))));
  };
  return make("div", "band", make("span", "", label), image(figure, `${label}, over ${T} tokens`));
}
