// What the page knows, and what of it the browser stores: conversations and settings until they are deleted, the API key
// until the tab is closed.
import { status } from "./dom.js";

export const DEFAULTS = { system: "", temperature: 0.8, top_p: 1, min_p: 0.05, top_k: 0, repetition_penalty: 1, max_tokens: 256, seed: "" };
const PREFIX = "moonwhale.";

// A conversation: { id, title, messages, draws }. An answer among its messages has `from`, the index of the first message
// that the model saw, `system`, the instructions that it had, and `facts`, a line about it.
export const state = {
  model: null, // the server's model card; null until the server has answered, and after each failure
  conversations: read("conversations", isList).filter(isConversation),
  current: null,
  settings: { ...DEFAULTS },
  key: "",
  busy: null, // the AbortController of the answer that is being written
  editing: null, // the user's message that is being edited
  examined: null, // the answer that the X-ray shows
};
Object.assign(state.settings, readSettings());
try { state.key = sessionStorage.getItem(`${PREFIX}key`) ?? ""; } catch { /* the page asks again after each reload */ }

export function newConversation() {
  return { id: crypto.randomUUID?.() ?? String(Math.random()), title: "", messages: [], draws: 0 };
}

export function save() {
  try {
    // A failure is about this moment, so it is not kept.
    const conversations = JSON.stringify(state.conversations, (key, value) => key === "failure" ? undefined : value);
    localStorage.setItem(`${PREFIX}conversations`, conversations);
    localStorage.setItem(`${PREFIX}settings`, JSON.stringify(state.settings));
  } catch (error) {
    status(error.name === "QuotaExceededError"
      ? "This browser's storage for the page is full: delete old conversations, or new ones are lost when you leave."
      : "This browser does not store data: conversations are lost when you leave the page.");
  }
}

export function saveKey() {
  try { sessionStorage.setItem(`${PREFIX}key`, state.key); } catch { /* it is kept until the next reload */ }
}

// Takes over what another tab has stored.
export function reload() {
  state.conversations = read("conversations", isList).filter(isConversation);
  state.current = state.conversations.find(({ id }) => id === state.current.id) ?? state.current;
}

// Stored data may be of an earlier version or edited by hand: what does not fit is left out.
function read(name, fits) {
  try {
    const value = JSON.parse(localStorage.getItem(PREFIX + name));
    return fits(value) ? value : [];
  } catch { return []; }
}
function readSettings() {
  const stored = read("settings", (value) => value !== null && typeof value === "object");
  return Object.fromEntries(Object.entries(stored).filter(([name, value]) => typeof value === typeof DEFAULTS[name]));
}
function isList(value) { return Array.isArray(value); }
function isConversation(value) {
  return typeof value?.title === "string" && isList(value.messages) && value.messages.every(
    (message) => ["user", "assistant"].includes(message?.role) && typeof message.content === "string");
}
