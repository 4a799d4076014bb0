// Markdown in blocks: paragraphs, headings, lists, quotes, tables, rules and fenced code. It makes elements, never HTML
// text, so a model's text cannot become a script. The time is linear in the text.
import { actionButton, element } from "./dom.js";
import { appendInline } from "./inline.js";

const DEEPEST = 8; // lists and quotes within one another; what is deeper is text
const LONGEST = 200_000; // characters; a longer text is shown as it is
const FENCE = /^ {0,3}(`{3,}|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6}) +(\S.*)$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)/;

export function renderMarkdown(text) {
  const root = document.createDocumentFragment();
  if (text.length > LONGEST) root.append(element("p", { textContent: text }));
  else appendBlocks(root, text.replaceAll("\r\n", "\n").replaceAll("\t", "    ").split("\n"), 0);
  return root;
}

function appendBlocks(parent, lines, depth) {
  let i = 0;
  while (i < lines.length) {
    if (!lines[i].trim()) { i += 1; continue; }
    const read = (depth < DEEPEST && readerOf(lines, i)) || readParagraph;
    const [node, next] = read(lines, i, depth);
    parent.append(node);
    i = next;
  }
}

// Each reader returns the node of the block that starts in line i, and the line after it.
function readerOf(lines, i) {
  return [readCode, readHeading, readRule, readQuote, readList, readTable].find((read) => read.starts(lines, i));
}

function readCode(lines, i) {
  const [, fence, info] = FENCE.exec(lines[i]), [language] = info.trim().split(/\s/, 1);
  let end = i + 1;
  const closes = (line) => line.trim().length >= fence.length && line.trim() === fence[0].repeat(line.trim().length);
  while (end < lines.length && !closes(lines[end])) end += 1; // a fence that nothing closes reaches to the end
  const copy = actionButton("copyCode", "Copy", { "aria-label": "Copy the code" });
  const bar = element("div", { className: "bar" }, element("span", { textContent: language || "text" }), copy);
  const code = element("pre", { tabIndex: 0 }, element("code", { textContent: lines.slice(i + 1, end).join("\n") }));
  return [element("div", { className: "code" }, bar, code), end + 1];
}
readCode.starts = (lines, i) => {
  const found = FENCE.exec(lines[i]);
  return found && !(found[1][0] === "`" && found[2].includes("`"));
};

function readHeading(lines, i) {
  const [, marks, text] = HEADING.exec(lines[i]);
  const node = element(`h${Math.min(marks.length + 3, 6)}`); // h3 names the author
  let end = text.trimEnd().length;
  while (text[end - 1] === "#") end -= 1;
  appendInline(node, text.slice(0, end).trimEnd());
  return [node, i + 1];
}
readHeading.starts = (lines, i) => HEADING.test(lines[i]);

function readRule(_, i) { return [element("hr"), i + 1]; }
readRule.starts = (lines, i) => {
  const marks = lines[i].replaceAll(" ", "");
  return marks.length >= 3 && "-*_".includes(marks[0]) && marks === marks[0].repeat(marks.length);
};

function readQuote(lines, i, depth) {
  const inside = [];
  for (; i < lines.length && QUOTE.test(lines[i]); i++) inside.push(lines[i].replace(QUOTE, ""));
  const node = element("blockquote");
  appendBlocks(node, inside, depth + 1);
  return [node, i];
}
readQuote.starts = (lines, i) => QUOTE.test(lines[i]);

function readList(lines, i, depth) {
  const [, indent, marker] = ITEM.exec(lines[i]);
  const isNumbered = /\d/.test(marker);
  const list = element(isNumbered ? "ol" : "ul");
  if (isNumbered && marker.slice(0, -1) !== "1") list.start = parseInt(marker, 10);
  const isItem = (line) => {
    const found = ITEM.exec(line);
    return found && found[1].length <= indent.length + 1 && /\d/.test(found[2]) === isNumbered;
  };
  while (i < lines.length && isItem(lines[i])) {
    const width = ITEM.exec(lines[i])[0].length;
    const inside = [lines[i].slice(width)];
    // The item goes on with lines that are indented further than its mark, and blank ones between them.
    for (i += 1; i < lines.length; i++) {
      const isBlank = !lines[i].trim(), space = lines[i].search(/\S/);
      if (isBlank ? !(lines[i + 1]?.startsWith(" ".repeat(indent.length + 2))) : space < indent.length + 2) break;
      inside.push(lines[i].slice(Math.min(width, Math.max(space, 0))));
    }
    const item = element("li");
    appendBlocks(item, inside, depth + 1);
    list.append(item);
    let next = i; // blank lines may stand between items
    while (next < lines.length && !lines[next].trim()) next += 1;
    if (next < lines.length && isItem(lines[next])) i = next;
  }
  return [list, i];
}
readList.starts = (lines, i) => ITEM.test(lines[i]) && lines[i].trim().length > 1;

function readTable(lines, i) {
  const heads = cells(lines[i]);
  const row = (tag, texts) => element("tr", {}, ...texts.slice(0, heads.length).map((text) => {
    const cell = element(tag);
    appendInline(cell, text);
    return cell;
  }));
  const body = element("tbody");
  let next = i + 2;
  for (; next < lines.length && lines[next].includes("|"); next++) body.append(row("td", cells(lines[next])));
  const table = element("table", {}, element("thead", {}, row("th", heads)), body);
  return [element("div", { className: "table", tabIndex: 0 }, table), next];
}
readTable.starts = (lines, i) => {
  const rule = lines[i + 1] ?? "";
  return lines[i].includes("|") && rule.includes("|") && rule.includes("-") && /^[ |:-]+$/.test(rule);
};

function cells(line) {
  const inside = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inside.split(/(?<!\\)\|/).map((cell) => cell.trim());
}

function readParagraph(lines, i) {
  const start = i;
  do i += 1; while (i < lines.length && lines[i].trim() && !readerOf(lines, i));
  const node = element("p");
  appendInline(node, lines.slice(start, i).map((line) => line.trim()).join("\n"));
  return [node, i];
}
