// Saves a panel as a picture. Its boxes and lines of text become SVG shapes, so that any viewer shows the same.
const MARGIN = 12;
function panelAsSvg(panel) {
  const box = panel.getBoundingClientRect(),
    style = getComputedStyle(panel);
  const width = Math.ceil(box.width),
    height = Math.ceil(box.height);
  const picture = svg("svg", { xmlns: SVG, width, height, viewBox: `0 0 ${width} ${height}` });
  picture.append(svg("rect", { width, height, fill: style.backgroundColor }));
  for (const child of panel.children) addElement(picture, child, box);
  return picture;
}
function addElement(picture, element, origin) {
  if (element.matches(".save, input, form") || element.hidden) return;
  const box = element.getBoundingClientRect(),
    style = getComputedStyle(element),
    x = box.left - origin.left,
    y = box.top - origin.top;
  if (element.tagName === "svg") {
    addDrawing(picture, element, x, y, box);
    return;
  }
  const { width, height } = box;
  if (style.backgroundColor !== "rgba(0, 0, 0, 0)" && width && height)
    picture.append(svg("rect", { x, y, width, height, fill: style.backgroundColor }));
  for (const [side, x1, y1, x2, y2] of [
    ["Top", x, y, x + width, y],
    ["Bottom", x, y + height, x + width, y + height],
    ["Left", x, y, x, y + height],
    ["Right", x + width, y, x + width, y + height],
  ]) {
    const thick = parseFloat(style[`border${side}Width`]),
      colour = style[`border${side}Color`];
    if (!thick || colour === "rgba(0, 0, 0, 0)" || style[`border${side}Style`] === "none") continue;
    const line = svg("line", { x1, y1, x2, y2, stroke: colour, "stroke-width": thick });
    if (style[`border${side}Style`] === "dashed") line.setAttribute("stroke-dasharray", `${2 * thick} ${2 * thick}`);
    picture.append(line);
  }
  for (const child of element.childNodes) {
    if (child.nodeType === Node.ELEMENT_NODE) addElement(picture, child, origin);
    else if (child.nodeType === Node.TEXT_NODE) addText(picture, child, style, origin);
  }
}
function addDrawing(picture, element, x, y, box) {
  const copy = element.cloneNode(true),
    shapes = copy.querySelectorAll("*");
  for (const [i, shape] of [...element.querySelectorAll("*")].entries()) {
    shapes[i].setAttribute("fill", getComputedStyle(shape).fill);
    shapes[i].removeAttribute("class");
  }
  copy.removeAttribute("style");
  picture.append(
    svg("rect", { x, y, width: box.width, height: box.height, fill: "none", stroke: getComputedStyle(element).borderTopColor }),
  );
  for (const [name, value] of Object.entries({ x, y, width: box.width, height: box.height })) copy.setAttribute(name, value);
  picture.append(copy);
}
// Adds the lines of a text as the browser broke them.
function addText(picture, text, style, origin) {
  const range = document.createRange(),
    lines = [];
  for (const { 0: word, index } of text.data.matchAll(/\S+/g)) {
    range.setStart(text, index);
    range.setEnd(text, index + word.length);
    for (const box of range.getClientRects()) {
      const last = lines.at(-1);
      if (last && Math.abs(last.top - box.top) < 2)
        Object.assign(last, { right: box.right, words: box.left === last.left ? last.words : `${last.words} ${word}` });
      else lines.push({ left: box.left, right: box.right, top: box.top, bottom: box.bottom, words: word });
    }
  }
  for (const { left, right, top, bottom, words } of lines) {
    const y = (top + bottom) / 2 - origin.top;
    const line = svg("text", {
      x: left - origin.left,
      y,
      "dominant-baseline": "central",
      fill: style.color,
      "font-size": style.fontSize,
      "font-weight": style.fontWeight,
      "font-family": style.fontFamily,
      textLength: right - left,
      lengthAdjust: "spacingAndGlyphs",
    });
    line.textContent = words;
    picture.append(line);
  }
}

async function savePanel(panel, kind) {
  panel.classList.add("whole"); // also what is scrolled away
  const picture = panelAsSvg(panel);
  panel.classList.remove("whole");
  const text = new XMLSerializer().serializeToString(picture);
  const width = Number(picture.getAttribute("width")),
    height = Number(picture.getAttribute("height"));
  save(kind === "svg" ? new Blob([text], { type: "image/svg+xml" }) : await asPng(text, width, height), `${panel.id}.${kind}`);
}
async function asPng(text, width, height) {
  const drawn = new Image();
  drawn.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  await drawn.decode();
  const canvas = document.createElement("canvas"),
    scale = 2; // sharp in print
  Object.assign(canvas, { width: scale * width, height: scale * height });
  canvas.getContext("2d").drawImage(drawn, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}
function save(blob, name) {
  const link = make("a");
  Object.assign(link, { href: URL.createObjectURL(blob), download: `xray-${name}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
