// The chat page: what the user's actions do. It talks only to the server that sent it.
import { ask, regenerate, saveUnfinished } from "./answer.js";
import { copy } from "./copy.js";
import { askForKey, confirmed, openSettings } from "./dialogs.js";
import { $, status } from "./dom.js";
import { KeyNeeded, connect } from "./server.js";
import { deleteConversation, newConversation, reload, state } from "./state.js";
import { showConversations, toggleMenu } from "./sidebar.js";
import { focusText, render } from "./view.js";
import { closeXray, examine } from "./xray.js";

// --- conversations ---------------------------------------------------------------------------------------------------

function open(conversation) {
  state.current = conversation;
  toggleMenu(false);
  render();
  focusText();
}
async function remove(conversation) {
  const isOpen = conversation.id === state.current.id;
  if (!await confirmed(`Delete “${conversation.title}”? It cannot be brought back.`, "Delete")) return;
  if (state.busy?.conversation === conversation) state.busy.abort();
  deleteConversation(conversation);
  if (isOpen) open(newConversation()); else render();
  $("new").focus();
}
function edit(message) {
  state.current.editing = { message, text: message.content };
  render();
  $("edited").focus();
  $("edited").scrollIntoView({ block: "nearest" });
}

// What buttons with data-action do. `item` is the message or the conversation that the button belongs to.
const actions = {
  copy: (message, button) => copy(message.content, button),
  copyCode: (_, button) => copy(button.closest(".code").querySelector("code").textContent, button),
  edit,
  cancelEdit: () => {
    delete state.current.editing;
    reload(); // what another tab has saved meanwhile
    render();
    focusText();
  },
  sendEdited: (message) => {
    const text = $("edited").value.trim();
    if (!text || state.busy) return;
    delete state.current.editing;
    ask(text, state.current.messages.indexOf(message));
  },
  regenerate: () => { if (!state.busy) regenerate(); },
  examine: (message) => orStatus(examine(state.current, message)),
  open,
  delete: remove,
};
function dispatch(event, items) {
  const button = event.target.closest("[data-action]");
  if (button) actions[button.dataset.action](items()[button.closest("[data-index]").dataset.index], button);
}
$("messages").onclick = (event) => dispatch(event, () => state.current.messages);
$("conversations").onclick = (event) => dispatch(event, () => state.conversations);

// --- the other buttons -----------------------------------------------------------------------------------------------

$("menu").onclick = () => toggleMenu();
$("new").onclick = () => open(newConversation());
$("stop").onclick = () => state.busy?.abort();
$("close-xray").onclick = closeXray;
$("open-settings").onclick = openSettings;

// --- the message box and the keyboard --------------------------------------------------------------------------------

$("composer").onsubmit = (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || state.busy) return;
  $("text").value = "";
  ask(text).then(grow);
  grow();
};
function grow() { $("text").style.height = "auto"; $("text").style.height = `${$("text").scrollHeight + 2}px`; }
$("text").oninput = grow;
document.onkeydown = (event) => {
  if (event.isComposing || event.keyCode === 229) return; // the key is for an input method; Safari tells only by 229
  if (event.key === "Enter" && !event.shiftKey && ["text", "edited"].includes(event.target.id)) {
    event.preventDefault();
    if (event.target.id === "text") $("composer").requestSubmit();
    else actions.sendEdited(state.current.editing.message);
  }
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (event.target.closest("article:has(#edited)")) actions.cancelEdit();
  else if (state.busy) state.busy.abort();
  else if (state.examined) closeXray();
  else if (document.body.classList.contains("menu-open")) { toggleMenu(false); $("menu").focus(); }
};

// --- the server and other tabs ---------------------------------------------------------------------------------------

// Waits for a promise. If it fails, the status line says why.
async function orStatus(promise) {
  try { await promise; } catch (error) {
    status(error.message);
    state.model = null;
    if (error instanceof KeyNeeded) askForKey(start);
  }
}
async function start() {
  await orStatus(connect());
  if (!state.model) return;
  if (!state.busy) status("");
  render();
  focusText();
}
document.addEventListener("key-needed", () => askForKey(start));
addEventListener("storage", () => {
  reload();
  if (state.current.editing) showConversations(); else render();
});
// A phone may discard a hidden tab without a further event.
for (const leaving of ["pagehide", "visibilitychange"]) addEventListener(leaving, saveUnfinished);

open(newConversation());
start();
