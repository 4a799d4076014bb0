// The page's small vocabulary. Text reaches the page as text nodes only, so a token cannot be markup.
const $ = (id) => document.getElementById(id);
const shown = (text) =>
  text === "" ? "∅" : text.replace(/\n/g, "⏎").replace(/[\u0000-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g, "�");
const percent = (x) => (100 * x).toFixed(x < 0.0995 ? 1 : 0) + " %";
const signed = (x, digits) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits);
const plain = (x, digits) => (x < 0 ? "−" : "") + Math.abs(x).toFixed(digits);
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

function make(tag, cls, ...children) {
  const element = document.createElement(tag);
  if (cls) element.className = cls;
  element.append(...children);
  return element;
}
const paragraph = (...parts) => make("p", "", ...parts);
const quote = (text) => make("span", "quote", shown(text));
// A word of a legend with the colour that stands for it.
const legend = (word, cls = "") => make("span", "legend", make("i", cls), word);
function button(text, act, cls = "") {
  const element = make("button", cls, text);
  element.type = "button";
  element.onclick = act;
  return element;
}
function image(element, label) {
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", label);
  return element;
}

// Fills a panel. Its title has buttons that save the panel as a picture.
function fill(id, title, ...parts) {
  const head = make("div", "title", make("h2", "", title));
  for (const kind of ["SVG", "PNG"]) {
    const save = button(kind, () => savePanel($(id), kind.toLowerCase()), "save");
    save.setAttribute("aria-label", `Save “${title}” as ${kind}`);
    head.append(save);
  }
  $(id).replaceChildren(head, ...parts);
}

// Bars along a common scale. A row is { name, value, label, extra? }; each bar ends at value of `most`.
function bars(rows, most, extra) {
  const table = make("table");
  for (const { name, value, label } of rows) {
    const track = make("div", "track", span(0, value / most));
    if (extra) track.append(extra());
    table.append(make("tr", "", make("th", "name", name), make("td", "", track), make("td", "n", label)));
  }
  return table;
}
// A filled part of a track, from share a to share b of its width.
function span(a, b, cls = "") {
  const element = make("i", cls),
    [from, to] = [Math.min(a, b), Math.max(a, b)].map((x) => Math.max(0, Math.min(1, x)));
  element.style.left = `${100 * from}%`;
  element.style.width = `${100 * (to - from)}%`;
  return element;
}

const SVG = "http://www.w3.org/2000/svg";
function svg(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
