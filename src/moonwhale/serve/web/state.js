// What the page knows, and what of it the browser stores: conversations and settings until they are deleted, the API
// key until the tab is closed. Each conversation has an entry of its own, so that tabs do not overwrite each other's.
import { status } from "./dom.js";

const PREFIX = "moonwhale.", CONVERSATION = `${PREFIX}conversation.`;
export const DEFAULTS = {
  system: "", temperature: 0.8, top_p: 1, min_p: 0.05, top_k: 0, repetition_penalty: 1, max_tokens: 256, seed: "",
};

// A conversation is { id, title, messages, draws, time }. An answer among its messages has `from`, the index of the
// first message that the model saw, `system`, the instructions that it had, and `facts`, a line about it. In this tab a
// conversation may also have a `failure`, which the page shows, and `editing`, { message, text } of a question that the
// user edits.
export const state = {
  model: null, // the server's model card; null until the server has answered, and after each failure
  conversations: storedConversations(), // newest first
  current: null,
  settings: { ...DEFAULTS, ...storedSettings() },
  key: "",
  busy: null, // the AbortController of the `answer` that is being written in a `conversation`, which was as `before`
  examined: null, // the answer that the X-ray shows
};
try { state.key = sessionStorage.getItem(`${PREFIX}key`) ?? ""; } catch { /* the page asks again after each reload */ }

export function newConversation() {
  return { id: crypto.randomUUID?.() ?? String(Math.random()), title: "", messages: [], draws: 0, time: 0 };
}

// Adds a conversation to the list if it is new, and moves it to the top.
export function touch(conversation) {
  conversation.time = Date.now();
  state.conversations = [...new Set([conversation, ...state.conversations])];
}
export function saveConversation(conversation) {
  touch(conversation);
  const { failure, editing, ...lasting } = conversation; // these two are about this moment
  store(() => localStorage.setItem(CONVERSATION + conversation.id, JSON.stringify(lasting)));
}
export function deleteConversation({ id }) {
  state.conversations = state.conversations.filter((other) => other.id !== id);
  store(() => localStorage.removeItem(CONVERSATION + id));
}
export function saveSettings() {
  store(() => localStorage.setItem(`${PREFIX}settings`, JSON.stringify(state.settings)));
}
export function saveKey() {
  try { sessionStorage.setItem(`${PREFIX}key`, state.key); } catch { /* it is kept until the next reload */ }
}

function store(write) {
  try { write(); } catch (error) {
    status(error.name === "QuotaExceededError"
      ? "This browser's storage for the page is full: delete old conversations, or new ones are lost when you leave."
      : "This browser does not store data: conversations are lost when you leave the page.");
  }
}

// Takes over what another tab has stored, but for conversations that are being answered or edited here.
// What is as it was here stays the same object, which an open X-ray, the scrolled place and a failure belong to.
export function reload() {
  const isHeld = (own) => own === state.busy?.conversation || own.editing;
  const held = state.conversations.filter(isHeld);
  const asHere = (stored) => state.conversations.find(({ id, time }) => id === stored.id && time === stored.time);
  const others = storedConversations().filter(({ id }) => !held.some((own) => own.id === id));
  state.conversations = [...held, ...others.map((stored) => asHere(stored) ?? stored)].sort((a, b) => b.time - a.time);
  state.current = state.conversations.find(({ id }) => id === state.current.id) ?? state.current;
  Object.assign(state.settings, storedSettings());
}

// Stored data may be of another version or edited by hand: what does not fit is left out.
function storedConversations() {
  let names = [];
  try { names = Object.keys(localStorage); } catch { /* this browser stores nothing */ }
  const stored = names.filter((name) => name.startsWith(CONVERSATION)).map(read);
  return stored.filter(isConversation).sort((a, b) => b.time - a.time);
}
function storedSettings() {
  const stored = Object.entries(read(`${PREFIX}settings`) ?? {});
  return Object.fromEntries(stored.filter(([name, value]) => typeof value === typeof DEFAULTS[name]));
}
function read(name) {
  try { return JSON.parse(localStorage.getItem(name)); } catch { return null; }
}
function isConversation(value) {
  return typeof value?.id === "string" && typeof value.title === "string" && Number.isFinite(value.time)
    && Array.isArray(value.messages) && value.messages.every(isMessage);
}
function isMessage(value) {
  return ["user", "assistant"].includes(value?.role) && typeof value.content === "string";
}
