// The list of conversations. On a phone it takes the place of the messages while it is open.
import { $, actionButton, element } from "./dom.js";
import { state } from "./state.js";

export function showConversations() {
  $("conversations").replaceChildren(...state.conversations.map(({ title }, index) => {
    const open = actionButton("open", title, { className: "title", title });
    open.setAttribute("aria-current", state.conversations[index].id === state.current.id);
    const bin = actionButton("delete", "✕", { "aria-label": `Delete “${title}”` });
    const item = element("li", {}, open, bin);
    item.dataset.index = index;
    return item;
  }));
}

export function toggleMenu(isOpen = $("menu").getAttribute("aria-expanded") !== "true") {
  document.body.classList.toggle("menu-open", isOpen);
  $("menu").setAttribute("aria-expanded", isOpen);
}
