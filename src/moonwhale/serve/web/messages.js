// Shows the open conversation.
import { $, actionButton, element } from "./dom.js";
import { state } from "./state.js";
import { showAnswer, splitThought } from "./thoughts.js";

let shown = null; // the conversation that is on the page

export function showMessages() {
  const { messages, failure } = state.current;
  const box = $("messages"), top = box.scrollTop, goesToEnd = isAtEnd(box) || shown !== state.current;
  const firstSeen = messages.findLast(({ role }) => role === "assistant")?.from ?? 0;
  const nodes = messages.map(bubble);
  if (firstSeen > 0) nodes.splice(firstSeen, 0, element("p", { className: "forgotten", textContent: "The model no longer sees what is above: its context is full." }));
  if (!messages.length) nodes.push(element("p", { className: "empty", textContent: "A small model, so expect small talk." }));
  if (failure) nodes.push(element("p", { className: "message error", textContent: failure, role: "alert" }));
  box.replaceChildren(...nodes);
  box.scrollTop = goesToEnd ? box.scrollHeight : top;
  shown = state.current;
}
export function scrollToEnd() { $("messages").scrollTop = $("messages").scrollHeight; }
function isAtEnd(box) { return box.scrollHeight - box.scrollTop - box.clientHeight < 80; }

function bubble(message, index) {
  const isAnswer = message.role === "assistant";
  const node = element("article", { className: `message ${message.role}` });
  node.dataset.index = index;
  node.classList.toggle("examined", message === state.examined);
  node.append(element("h3", { textContent: isAnswer ? "Moonwhale" : "You" }));
  if (message === state.editing) return editor(node, message);
  const box = element("div", { className: "content", dir: "auto" });
  node.append(box);
  if (!isAnswer) box.append(element("p", { textContent: message.content }));
  else if (isWriting(message)) showAnswer(box, message.content, true);
  else if (message.content) showAnswer(box, message.content, false);
  else box.append(element("p", { className: "note", textContent: "(an empty answer)" }));
  node.append(isAnswer ? answerRow(message, index) : row(actionButton("copy", "Copy"), actionButton("edit", "Edit", { disabled: Boolean(state.busy) })));
  return node;
}
function isWriting(message) { return Boolean(state.busy) && message === state.busy.answer; }

function row(...children) { return element("div", { className: "facts" }, ...children); }
function answerRow(message, index) {
  if (isWriting(message)) return row();
  const isLast = index === state.current.messages.length - 1;
  return row(
    ...(message.facts ? [element("span", { textContent: message.facts })] : []),
    ...(message.content ? [actionButton("copy", "Copy")] : []),
    ...(isLast ? [actionButton("regenerate", "Try again", { disabled: Boolean(state.busy) })] : []),
    ...(message.content ? [actionButton("examine", "X-ray", { "aria-pressed": message === state.examined })] : []),
  );
}

function editor(node, message) {
  const text = element("textarea", { id: "edited", value: message.content, "aria-label": "Edit your message" });
  const note = element("span", { textContent: "What follows it is replaced." });
  node.append(text, row(actionButton("sendEdited", "Send", { className: "" }), actionButton("cancelEdit", "Cancel"), note));
  return node;
}

// Shows what has been written of the last answer so far, and follows it unless the user has scrolled up.
export function showProgress(answer) {
  const box = $("messages"), goesToEnd = isAtEnd(box);
  const content = box.querySelector(`[data-index="${state.current.messages.indexOf(answer)}"] .content`);
  if (!content) return; // another conversation is open
  showAnswer(content, answer.content, true);
  if (goesToEnd) scrollToEnd();
}

// Tells a screen reader the whole answer once: a log that changes with each token would be read again and again.
export function speak(answer) { $("spoken").textContent = `Moonwhale: ${splitThought(answer.content).rest}`; }
