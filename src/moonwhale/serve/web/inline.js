// Inline Markdown: `code`, *emphasis*, **strong**, ~~struck~~, [links](https://…) and addresses. Everything else is
// text, HTML included. The time is linear in the text: a model writes anything.
import { element } from "./dom.js";

const SCHEMES = ["http:", "https:", "mailto:"];
const LONGEST_ADDRESS = 1000;
const TAGS = { "*": "em", _: "em", "**": "strong", __: "strong", "~~": "del" };
const SPECIAL = /[\\`*_~[!h]/g; // h: of http

// Appends the nodes of a text to a parent.
export function appendInline(parent, text, mayLink = true) {
  const stack = [{ node: parent, mark: null }]; // at most one open element of each mark
  const brackets = mayLink ? matchingBrackets(text) : new Map();
  const ticks = runsOfBackticks(text);
  let plain = 0, at = 0; // text[plain:at] is text that has not been appended yet
  const flush = (end) => { if (end > plain) stack.at(-1).node.append(text.slice(plain, end)); };
  const skipTo = (end) => { plain = at = end; };

  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const found = SPECIAL.exec(text);
    if (!found) break;
    at = found.index;
    const char = text[at];
    if (char === "\\") {
      if (/[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) { flush(at); plain = at + 1; at += 2; } else at += 1;
    } else if (char === "`") {
      const size = runLength(text, at), starts = ticks.get(size) ?? [];
      while (starts.at(-1) <= at) starts.pop();
      if (!starts.length) { at += size; continue; }
      flush(at);
      stack.at(-1).node.append(element("code", { textContent: text.slice(at + size, starts.at(-1)) }));
      skipTo(starts.at(-1) + size);
    } else if (char === "[" || (char === "!" && text[at + 1] === "[")) {
      const link = readLink(text, char === "!" ? at + 1 : at, brackets);
      if (!link) { at += 1; continue; }
      flush(at);
      stack.at(-1).node.append(char === "!" ? imageNode(link) : linkNode(link));
      skipTo(link.end);
    } else if (char === "h") {
      const address = mayLink && !/\w/.test(text[at - 1] ?? "") && readAddress(text, at);
      if (!address) { at += 1; continue; }
      flush(at);
      stack.at(-1).node.append(linkNode({ label: address, address }));
      skipTo(at + address.length);
    } else if (char === "!") at += 1;
    else {
      const size = runLength(text, at);
      flush(at);
      const used = size > 3 ? 0 : mark(stack, text, at, size);
      plain = at + used;
      at += size;
    }
  }
  flush(text.length);
  while (stack.length > 1) unwrap(stack);
}

// Returns where the runs of each length start, last first.
function runsOfBackticks(text) {
  const runs = new Map();
  for (const { 0: run, index } of [...text.matchAll(/`+/g)].reverse()) {
    if (!runs.has(run.length)) runs.set(run.length, []);
    runs.get(run.length).push(index);
  }
  return runs;
}
function runLength(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

// Closes and opens elements for a run of marks. Returns how many characters of it were marks.
function mark(stack, text, at, size) {
  const char = text[at], before = text[at - 1] ?? " ", after = text[at + size] ?? " ";
  const word = /[\p{L}\p{N}]/u;
  const closes = !/\s/.test(before) && !(char === "_" && word.test(after));
  const opens = !/\s/.test(after) && !(char === "_" && word.test(before));
  const isOpen = (name) => stack.some((entry) => entry.mark === name);
  let left = size;
  while (left > 0) {
    const fits = (entry) => entry.mark?.[0] === char && entry.mark.length <= left && entry.node.hasChildNodes();
    const closable = closes ? stack.filter(fits) : [];
    const closing = closable.find((entry) => entry.mark.length === left) ?? closable.at(-1);
    const opening = opens && [char + char, char].find((name) => name in TAGS && name.length <= left && !isOpen(name));
    if (closing) {
      while (stack.at(-1) !== closing) unwrap(stack);
      stack.pop();
      left -= closing.mark.length;
    } else if (opening) {
      const node = element(TAGS[opening]);
      stack.at(-1).node.append(node);
      stack.push({ node, mark: opening });
      left -= opening.length;
    } else break;
  }
  return size - left;
}

// Turns the innermost open element, which nothing closes, back into text.
function unwrap(stack) {
  const { node, mark } = stack.pop();
  node.before(mark);
  while (node.firstChild) node.before(node.firstChild);
  node.remove();
}

function matchingBrackets(text) {
  const open = [], matches = new Map();
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "\\") i += 1;
    else if (text[i] === "[") open.push(i);
    else if (text[i] === "]" && open.length) matches.set(open.pop(), i);
  }
  return matches;
}

function readLink(text, at, brackets) {
  const close = brackets.get(at);
  if (close === undefined || text[close + 1] !== "(") return null;
  const inside = text.slice(close + 2, close + 2 + LONGEST_ADDRESS);
  let depth = 0;
  for (let i = 0; i < inside.length; i++) {
    if (inside[i] === "(") depth += 1;
    else if (inside[i] === ")" && depth-- === 0) {
      const [address] = inside.slice(0, i).trim().split(/\s/, 1); // a title may follow
      return { label: text.slice(at + 1, close), address: address.replace(/^<|>$/g, ""), end: close + 3 + i };
    }
  }
  return null;
}

function readAddress(text, at) {
  const found = /^https?:\/\/[^\s<>"`*[\]]+/.exec(text.slice(at, at + LONGEST_ADDRESS));
  if (!found) return null;
  let end = found[0].length;
  while (".,;:!?')".includes(found[0][end - 1])) end -= 1;
  return found[0].slice(0, end);
}

// Returns an address that a click may go to, or null. `new URL` removes what hides a scheme, such as line breaks.
export function safeAddress(address) {
  try {
    const url = new URL(address);
    return SCHEMES.includes(url.protocol) ? url.href : null;
  } catch { return null; }
}

function linkNode({ label, address }) {
  const href = safeAddress(address);
  if (!href) return element("span", { textContent: `${label} (${address})` });
  const link = element("a", { href, title: href, target: "_blank", rel: "noopener noreferrer" });
  appendInline(link, label, false);
  if (!link.textContent.trim()) link.textContent = href;
  return link;
}

// An image is never loaded: its address would tell somebody what was said.
function imageNode({ label, address }) {
  return element("span", { className: "image" }, "image: ", linkNode({ label: label || address, address }));
}
