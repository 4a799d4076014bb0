// The form of models that think first (DeepSeek-R1's): <think>…</think>, then the answer, perhaps in <answer> tags.
import { element } from "./dom.js";
import { renderMarkdown } from "./markdown.js";

// Returns the thought, null if there is none, whether it has ended, and the rest.
export function splitThought(content) {
  const start = /^\s*<think>/.exec(content);
  if (!start) return { thought: null, isOpen: false, rest: withoutAnswerTags(content) };
  const end = content.indexOf("</think>");
  const thought = content.slice(start[0].length, end < 0 ? undefined : end).trim();
  return { thought, isOpen: end < 0, rest: end < 0 ? "" : withoutAnswerTags(content.slice(end + "</think>".length)) };
}
function withoutAnswerTags(text) {
  const inside = text.trim();
  return inside.startsWith("<answer>") ? inside.slice("<answer>".length).replace("</answer>", "").trim() : text;
}

// Shows an answer in `box`, where a shorter part of it may be. A thought is folded unless the user has unfolded it: its
// <details> and <summary> stay in the page, or each word of an answer would take clicks and the focus from them.
export function showAnswer(box, content, isWriting) {
  const { thought, isOpen, rest } = splitThought(content);
  if (thought !== null && !box.querySelector("details")) {
    box.replaceChildren(element("details", { className: "thought" }, element("summary")));
  }
  const details = box.querySelector("details");
  if (details) {
    const summary = details.querySelector("summary");
    summary.textContent = !isOpen ? "Thoughts" : isWriting ? "Thinking…" : "Thoughts (unfinished)";
    replaceAfter(summary, details, renderMarkdown(thought));
  }
  replaceAfter(details, box, renderMarkdown(rest));
}

// Replaces all that follows the child `last`, or all if it is null.
function replaceAfter(last, parent, content) {
  while (parent.lastChild !== last) parent.lastChild.remove();
  parent.append(content);
}
