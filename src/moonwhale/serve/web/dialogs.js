// The dialogs: settings, the API key, and the question before something is lost. <dialog> keeps the focus inside.
import { $ } from "./dom.js";
import { DEFAULTS, saveKey, saveSettings, state } from "./state.js";

// Returns whether the user says yes.
export function confirmed(question, yes) {
  const dialog = $("confirm");
  $("question").textContent = question;
  $("yes").textContent = yes;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue === "yes");
  });
}

export function openSettings() {
  const form = $("settings-form");
  for (const [name, value] of Object.entries(state.settings)) form.elements[name].value = value;
  $("settings").returnValue = "";
  $("settings").showModal();
}
$("defaults").onclick = () => $("settings").close("defaults"); // no submit button: Enter in a field would press it
$("settings").onclose = () => {
  const chosen = $("settings").returnValue;
  if (chosen === "defaults") Object.assign(state.settings, DEFAULTS);
  if (chosen === "save") {
    for (const [name, value] of new FormData($("settings-form"))) {
      state.settings[name] = typeof DEFAULTS[name] === "number" ? Number(value) : value;
    }
  }
  if (chosen) saveSettings();
};

// Calls `retry` with the new key in place. The dialog closes by itself.
export function askForKey(retry) {
  $("key-note").textContent = state.key ? "The server refused this key." : "This server answers only with its API key.";
  $("key").value = "";
  $("key-form").onsubmit = () => {
    state.key = $("key").value.trim();
    saveKey();
    retry();
  };
  if (!$("key-dialog").open) $("key-dialog").showModal();
}
