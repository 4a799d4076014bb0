// The panel with the X-ray of one answer, which stays in view beside it.
import { $, status } from "./dom.js";
import { call, connect } from "./server.js";
import { state } from "./state.js";
import { asTurns } from "./turns.js";

// Shows what happened inside the model while it wrote an answer. Raises as `call`.
export async function examine(conversation, answer) {
  status("Looking inside the model…");
  const { id } = await connect();
  const { messages } = conversation;
  const seen = messages.slice(answer.from ?? 0, messages.indexOf(answer) + 1);
  const system = answer.system ? [{ role: "system", content: answer.system }] : [];
  const { url } = await (await call("xray", { model: id, messages: [...system, ...asTurns(seen).turns] })).json();
  status("");
  if (state.current !== conversation || !messages.includes(answer)) return; // the user has gone on meanwhile
  state.examined = answer;
  $("xray-frame").src = url;
  $("xray").hidden = false;
  mark();
  document.querySelector(".examined").scrollIntoView({ block: "nearest" });
  $("close-xray").focus();
}

// Closes the panel, and returns the focus to the button that opened it.
export function closeXray() {
  const button = document.querySelector(".examined [data-action=examine]");
  state.examined = null;
  $("xray").hidden = true;
  mark();
  (button ?? $("text")).focus();
}

// Closes the panel if its answer is no longer shown.
export function closeStaleXray() {
  if (state.examined && !state.current.messages.includes(state.examined)) closeXray();
}

function mark() {
  for (const node of document.querySelectorAll("article.assistant")) {
    const isExamined = state.current.messages[node.dataset.index] === state.examined;
    node.classList.toggle("examined", isExamined);
    node.querySelector("[data-action=examine]")?.setAttribute("aria-pressed", isExamined);
  }
}
