// Shows the open conversation.
import { $, actionButton, element } from "./dom.js";
import { state } from "./state.js";
import { showAnswer, splitThought } from "./thoughts.js";

let shown = null; // the conversation that is on the page
const boxes = new WeakMap(); // each message's content, kept so that a thought stays as the user has unfolded it
const editors = new WeakMap(); // the text area of each `editing`, kept so that it holds what the user has typed

export function showMessages() {
  const { messages, failure } = state.current;
  const box = $("messages"), top = box.scrollTop, goesToEnd = isAtEnd(box) || shown !== state.current;
  const nodes = messages.map(bubble);
  const note = (className, textContent, more = {}) => element("p", { className, textContent, ...more });
  const first = firstSeen(messages);
  const forgotten = note("forgotten", "The model no longer sees what is above: the context is full.");
  if (first > 0) nodes.splice(first, 0, forgotten);
  if (!messages.length) nodes.push(note("empty", "A small model, so expect small talk."));
  if (failure) nodes.push(note("message error", failure, { role: "alert" }));
  const isTyping = document.activeElement?.id === "edited";
  box.replaceChildren(...nodes);
  if (isTyping) $("edited")?.focus({ preventScroll: true });
  box.scrollTop = goesToEnd ? box.scrollHeight : top;
  shown = state.current;
}

// Returns the index of the first message that the model saw for the last answer.
export function firstSeen(messages) { return messages.findLast(({ role }) => role === "assistant")?.from ?? 0; }

export function scrollToEnd() { $("messages").scrollTop = $("messages").scrollHeight; }
function isAtEnd(box) { return box.scrollHeight - box.scrollTop - box.clientHeight < 80; }

function bubble(message, index) {
  const isAnswer = message.role === "assistant";
  const node = element("article", { className: `message ${message.role}` });
  node.dataset.index = index;
  node.classList.toggle("examined", message === state.examined);
  node.append(element("h3", { textContent: isAnswer ? "Moonwhale" : "You" }));
  if (message === state.current.editing?.message) return editor(node, state.current.editing);
  const box = boxes.get(message) ?? element("div", { className: "content", dir: "auto" });
  boxes.set(message, box);
  node.append(box);
  if (!isAnswer) box.replaceChildren(element("p", { textContent: message.content }));
  else if (message.content || isWriting(message)) showAnswer(box, message.content, isWriting(message));
  else box.replaceChildren(element("p", { className: "note", textContent: "(an empty answer)" }));
  node.append(isAnswer ? answerRow(message, index) : questionRow());
  return node;
}
function isWriting(message) { return Boolean(state.busy) && message === state.busy.answer; }

function questionRow() {
  const disabled = Boolean(state.busy || state.current.editing);
  return row(actionButton("copy", "Copy"), actionButton("edit", "Edit", { disabled }));
}
function row(...children) { return element("div", { className: "facts" }, ...children); }
function answerRow(message, index) {
  if (isWriting(message)) return row();
  const isLast = index === state.current.messages.length - 1, isExamined = message === state.examined;
  return row(
    ...(message.facts ? [element("span", { textContent: message.facts })] : []),
    ...(message.content ? [actionButton("copy", "Copy")] : []),
    ...(isLast ? [actionButton("regenerate", "Try again", { disabled: Boolean(state.busy) })] : []),
    ...(message.content.trim() ? [actionButton("examine", "X-ray", { "aria-pressed": isExamined })] : []),
  );
}

function editor(node, editing) {
  const fresh = { id: "edited", value: editing.text, "aria-label": "Edit your message" };
  const text = editors.get(editing) ?? element("textarea", fresh);
  editors.set(editing, text);
  const note = element("span", { textContent: "What follows it is replaced." });
  const send = actionButton("sendEdited", "Send", { className: "", disabled: Boolean(state.busy) });
  node.append(text, row(send, actionButton("cancelEdit", "Cancel"), note));
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
