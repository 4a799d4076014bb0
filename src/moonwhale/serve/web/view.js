// Shows the whole state.
import { $, status } from "./dom.js";
import { showMessages } from "./messages.js";
import { showConversations } from "./sidebar.js";
import { state } from "./state.js";
import { closeStaleXray } from "./xray.js";

export function render() {
  closeStaleXray();
  showConversations();
  showMessages();
  $("send").hidden = Boolean(state.busy);
  $("stop").hidden = !state.busy;
  if (state.busy) status("Writing…");
  if (state.model) $("model").textContent = `${state.model.id}, context ${state.model.context.toLocaleString("en")}`;
}

// Moves the focus to where the user writes: to the editor of a question if it is open, else to the message box.
export function focusText() { ($("edited") ?? $("text")).focus(); }
