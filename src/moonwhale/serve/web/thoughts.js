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

// Shows an answer in `box`. A thought is folded unless the user has unfolded it.
export function showAnswer(box, content, isWriting) {
  const { thought, isOpen, rest } = splitThought(content);
  const wasUnfolded = box.querySelector("details.thought")?.open ?? false;
  const parts = [];
  if (thought !== null) {
    const name = !isOpen ? "Thoughts" : isWriting ? "Thinking…" : "Thoughts (unfinished)";
    const summary = element("summary", { textContent: name });
    parts.push(element("details", { className: "thought", open: wasUnfolded }, summary, renderMarkdown(thought)));
  }
  parts.push(renderMarkdown(rest));
  box.replaceChildren(...parts);
}
