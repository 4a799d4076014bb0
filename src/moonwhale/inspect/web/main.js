// Shows a recording, and begins with the trained settings.
function show(recording) {
  S = recording;
  drawText();
  drawLayers();
  drawMap();
  drawCache();
  drawSettings();
  choose(token);
}
$("summary").textContent =
  `${plural(T, "token")}, ${T - R.prompt_tokens} of them written by a model of ` +
  `${R.facts.parameters.toLocaleString("en")} parameters. All numbers come from one recorded forward pass ` +
  `for each setting.`;
let resized = 0,
  widthDrawn = innerWidth;
addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(() => {
    if (innerWidth !== widthDrawn) {
      widthDrawn = innerWidth;
      drawAttention();
    }
  }, 150);
});
show(S);
