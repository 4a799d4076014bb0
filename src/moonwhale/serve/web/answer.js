// Asks for answers. A request that fails before the first word leaves the conversation as it was, and puts the question
// back where it was typed: in the message box, or in the editor of an older question. If the message box is no longer
// free, a new question stays in its conversation without an answer.
import { $, status } from "./dom.js";
import { firstSeen, scrollToEnd, showProgress, speak } from "./messages.js";
import { Failure, KeyNeeded, call, connect, events } from "./server.js";
import { showConversations } from "./sidebar.js";
import { deleteConversation, saveConversation, state, touch } from "./state.js";
import { asTurns } from "./turns.js";
import { focusText, render } from "./view.js";

// Asks `text` after the first `index` messages of the open conversation; those that follow are replaced.
export function ask(text, index = state.current.messages.length) {
  return respond(state.current, index, { role: "user", content: text });
}

// Answers the last message again. A seed gives each answer its own noise, so the new one differs.
export function regenerate() {
  const { messages } = state.current;
  const index = messages.findLastIndex(({ role }) => role === "user");
  return respond(state.current, index, messages[index]);
}

async function respond(conversation, index, question) {
  const before = { messages: conversation.messages, title: conversation.title };
  const kept = before.messages.slice(0, index);
  const answer = { role: "assistant", content: "", from: firstSeen(kept) };
  conversation.messages = [...kept, question, answer];
  if (index === 0) conversation.title = [...question.content].slice(0, 60).join("");
  delete conversation.failure;
  touch(conversation);
  state.busy = Object.assign(new AbortController(), { answer, conversation, before });
  render();
  scrollToEnd();
  try {
    await receive(conversation, answer, state.busy.signal);
    speak(answer);
  } catch (error) {
    if (error.name === "AbortError") answer.facts = "stopped";
    else {
      answer.facts = "incomplete";
      conversation.failure = inWords(error);
      state.model = null; // the next question asks which one the server has now
    }
    if (!answer.content) undo(conversation, before, question);
    if (error instanceof KeyNeeded) document.dispatchEvent(new Event("key-needed"));
  }
  state.busy = null;
  status("");
  save(conversation);
  render();
  if (conversation.failure && state.current === conversation) scrollToEnd();
  if (!document.querySelector("dialog[open]") && document.activeElement === document.body) focusText();
}

function inWords(error) {
  if (error instanceof Failure) return error.message;
  console.error(error);
  return `The page made a mistake: ${error.message}`;
}

async function receive(conversation, answer, signal) {
  const { id, context } = await connect(signal); // an X-ray that fails during the answer resets state.model
  const start = performance.now();
  // The server forgets the oldest turns if the context is full. What it has forgotten need not be sent again.
  const { turns, starts } = asTurns(conversation.messages.slice(answer.from, -1));
  const response = await call("v1/chat/completions", requestBody(id, conversation, answer, turns), signal);
  answer.from += starts[Number(response.headers.get("moonwhale-dropped-messages"))];
  let reason = "", usage = null, frame = 0;
  try {
    for await (const event of events(response)) {
      usage = event.usage ?? usage;
      for (const choice of event.choices) {
        answer.content += choice.delta.content ?? "";
        reason = choice.finish_reason ?? reason;
      }
      cancelAnimationFrame(frame);
      frame = requestAnimationFrame(() => showProgress(answer));
    }
  } finally {
    cancelAnimationFrame(frame); // it would show the answer as one that is still being written
  }
  const speed = usage.completion_tokens / ((performance.now() - start) / 1000);
  const limit = usage.total_tokens >= context ? "the context is full" : "the longest answer of the settings";
  const cut = reason === "length" ? `, cut off: ${limit}` : "";
  answer.facts = `${usage.completion_tokens} tokens, ${speed.toFixed(0)} per second${cut}`;
}

function requestBody(model, conversation, answer, turns) {
  const { system, seed, ...numbers } = state.settings;
  if (system) answer.system = system;
  const messages = system ? [{ role: "system", content: system }, ...turns] : turns;
  conversation.draws = (conversation.draws ?? 0) + 1;
  const own = seed === "" ? {} : { seed: Number(seed) + conversation.draws - 1 };
  const stream = { stream: true, stream_options: { include_usage: true } };
  return { model, messages, truncation: "auto", ...stream, ...numbers, ...own };
}

// Restores what a question has replaced. A new one is taken back only if its text has a place to go to.
function undo(conversation, before, question) {
  const isNew = hasGrown(conversation, before);
  const hasPlace = state.current === conversation && !$("text").value; // else the user has gone on meanwhile
  if (isNew && !hasPlace) return;
  const replaced = before.messages[conversation.messages.indexOf(question)];
  Object.assign(conversation, before);
  if (!before.messages.length) deleteConversation(conversation);
  if (isNew) $("text").value = question.content;
  else if (replaced !== question) conversation.editing = { message: replaced, text: question.content };
}

// Whether the question came after the others. Else it has replaced one, with all that followed.
const hasGrown = (conversation, before) => conversation.messages.length > before.messages.length;

function save(conversation) {
  if (state.conversations.includes(conversation)) saveConversation(conversation); // else it was deleted or taken back
}

// Stores what there is of an answer, because leaving the page ends it.
export function saveUnfinished() {
  if (!state.busy) return;
  const { answer, conversation, before } = state.busy;
  if (!answer.content && !hasGrown(conversation, before)) return; // what is stored has yet to be replaced by an answer
  answer.facts = "incomplete";
  save(conversation);
  showConversations(); // it has become the newest
}
