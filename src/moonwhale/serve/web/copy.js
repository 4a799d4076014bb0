// Copies text. `navigator.clipboard` is there only on https and this machine, so another way stands in for it.
import { element } from "./dom.js";

const SHOWN = 1500; // milliseconds that a button says so

export async function copy(text, button) {
  const isWritten = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  const isDone = isWritten || copyFromField(text);
  const label = button.textContent;
  button.textContent = isDone ? "Copied" : "Not allowed";
  button.disabled = true; // or its second click would take "Copied" for the label
  setTimeout(() => Object.assign(button, { textContent: label, disabled: false }), SHOWN);
}

function copyFromField(text) {
  const focused = document.activeElement;
  const field = element("textarea", { value: text, className: "hidden", "aria-hidden": "true" });
  document.body.append(field);
  field.select();
  const isDone = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return isDone;
}
