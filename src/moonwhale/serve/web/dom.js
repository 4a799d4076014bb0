// Shorthands for the document. No other file makes elements from text: nothing is ever parsed as HTML.
export const $ = (id) => document.getElementById(id);

export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.includes("-") || name === "role") node.setAttribute(name, value); else node[name] = value;
  }
  node.append(...children);
  return node;
}

// A button whose click main.js hands to the action of this name.
export function actionButton(action, label, attributes = {}) {
  const button = element("button", { type: "button", className: "quiet", textContent: label, ...attributes });
  button.dataset.action = action;
  return button;
}

export function status(text) { $("status").textContent = text; }
