// The chat page. It talks only to the server that sent it, and keeps conversations in localStorage.
"use strict";

const $ = (id) => document.getElementById(id);
const DEFAULTS = { system: "", temperature: 0.8, top_p: 1, min_p: 0.05, top_k: 0, repetition_penalty: 1, max_tokens: 256, seed: "" };
const KEY = "moonwhale.key"; // in sessionStorage: the browser forgets it with the tab
const state = { model: "", conversations: load("conversations", []), current: null, settings: { ...DEFAULTS, ...load("settings", {}) }, busy: null, key: "" };
delete state.settings.key; // where earlier versions kept it
try { state.key = sessionStorage.getItem(KEY) ?? ""; } catch { /* the page asks again after each reload */ }

function load(name, fallback) {
  try { return JSON.parse(localStorage.getItem(`moonwhale.${name}`)) ?? fallback; } catch { return fallback; }
}
function save() {
  try {
    localStorage.setItem("moonwhale.conversations", JSON.stringify(state.conversations));
    localStorage.setItem("moonwhale.settings", JSON.stringify(state.settings));
  } catch { status("This browser does not store data: conversations are lost when you leave the page."); }
}
function status(text) { $("status").textContent = text; }
function element(tag, attributes = {}, ...children) {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
}

// --- conversations ---------------------------------------------------------------------------------------------------

function startConversation() {
  state.current = { id: crypto.randomUUID?.() ?? String(Math.random()), title: "", messages: [] };
  show();
}
function select(conversation) {
  state.current = conversation;
  closeMenu();
  show();
  $("text").focus();
}
function remove(conversation) {
  state.conversations = state.conversations.filter((other) => other !== conversation);
  save();
  if (conversation === state.current) startConversation(); else show();
}
function show() {
  $("conversations").replaceChildren(...state.conversations.map((conversation) => {
    const { title } = conversation;
    const open = element("button", { className: "title", textContent: title, onclick: () => select(conversation) });
    open.setAttribute("aria-current", conversation === state.current);
    const bin = element("button", { textContent: "✕", onclick: () => remove(conversation) });
    bin.setAttribute("aria-label", `Delete “${title}”`);
    return element("li", {}, open, bin);
  }));
  const { messages } = state.current;
  $("messages").replaceChildren(...messages.map(bubble));
  if (!messages.length) $("messages").append(element("p", { className: "empty", textContent: "A small model, so expect small talk." }));
  const { failure } = state.current;
  if (failure) {
    $("messages").append(element("p", { className: "message error", textContent: failure.text, role: "alert" }));
    if (!$("text").value) $("text").value = failure.question;
    failure.question = "";
  }
  $("messages").scrollTop = $("messages").scrollHeight;
}
function bubble(message, index) {
  const author = { user: "You", assistant: "Moonwhale" }[message.role];
  const node = element("article", { className: `message ${message.role}` });
  node.append(element("h3", { textContent: author }), element("p", { textContent: message.content }));
  if (message.role === "assistant") node.append(facts(message, index));
  return node;
}
function facts(message, index) {
  const row = element("div", { className: "facts" });
  if (message.facts) row.append(element("span", { textContent: message.facts }));
  if (message.content) {
    const button = element("button", { type: "button", className: "quiet", textContent: "X-ray" });
    button.onclick = () => xray(state.current.messages.slice(0, index + 1));
    row.append(button);
  }
  return row;
}

// --- the server ------------------------------------------------------------------------------------------------------

function headers() {
  return { "content-type": "application/json", ...(state.key ? { authorization: `Bearer ${state.key}` } : {}) };
}
async function call(path, body, signal) {
  const post = { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
  const response = await fetch(path, body ? post : { headers: headers() });
  if (response.status === 401) askForKey();
  if (!response.ok) {
    const message = await response.json().then(({ error }) => error.message, () => `the server answered ${response.status}`);
    throw new Error(message);
  }
  return response;
}
// Yields the server-sent events of a response. A read may end in the middle of an event.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
function requestBody() {
  const { system, seed, ...numbers } = state.settings;
  const turns = state.current.messages.map(({ role, content }) => ({ role, content }));
  const messages = system ? [{ role: "system", content: system }, ...turns] : turns;
  return { model: state.model, messages, ...numbers, ...(seed === "" ? {} : { seed: Number(seed) }) };
}

async function ask(text) {
  const conversation = state.current;
  if (!conversation.messages.length) conversation.title = text.slice(0, 60);
  if (!state.conversations.includes(conversation)) state.conversations.unshift(conversation);
  delete conversation.failure;
  const question = { role: "user", content: text };
  conversation.messages.push(question);
  const body = { ...requestBody(), stream: true, stream_options: { include_usage: true } };
  const answer = { role: "assistant", content: "" };
  conversation.messages.push(answer);
  show();
  state.busy = new AbortController();
  setBusy(true);
  const shown = $("messages").lastElementChild.querySelector("p");
  const start = performance.now();
  let reason = "", tokens = 0;
  try {
    for await (const event of events(await call("v1/chat/completions", body, state.busy.signal))) {
      if (event.usage) tokens = event.usage.completion_tokens;
      for (const choice of event.choices) {
        answer.content += choice.delta.content ?? "";
        reason = choice.finish_reason ?? reason;
      }
      if (state.current === conversation) {
        const box = $("messages"), atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 80;
        shown.textContent = answer.content;
        if (atEnd) box.scrollTop = box.scrollHeight;
      }
    }
    const speed = tokens / ((performance.now() - start) / 1000);
    answer.facts = `${tokens} tokens, ${speed.toFixed(0)} per second${reason === "length" ? ", cut off at the longest answer" : ""}`;
    status("");
  } catch (error) {
    if (error.name === "AbortError") answer.facts = "stopped";
    else fail(conversation, [question, answer], error);
  }
  if (!answer.content) conversation.messages = conversation.messages.filter((message) => message !== answer);
  setBusy(false);
  save();
  if (state.current === conversation && !conversation.failure) show();
  $("text").focus();
}
// Takes the unanswered messages back, and leaves the error and the question with their conversation.
function fail(conversation, unanswered, error) {
  conversation.messages = conversation.messages.filter((message) => !unanswered.includes(message));
  const isOpen = state.current === conversation;
  if (isOpen && !conversation.messages.length) state.conversations = state.conversations.filter((other) => other !== conversation);
  // fetch raises a TypeError if it cannot connect.
  const text = error instanceof TypeError ? "The server does not answer. Is it still running?" : error.message;
  conversation.failure = { text, question: unanswered[0].content };
  if (isOpen) show();
}
function setBusy(busy) {
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  if (busy) status("Writing…"); else { state.busy = null; if ($("status").textContent === "Writing…") status(""); }
}

// --- X-ray -----------------------------------------------------------------------------------------------------------

async function xray(messages) {
  status("Looking inside the model…");
  try {
    const turns = messages.map(({ role, content }) => ({ role, content }));
    const { url } = await (await call("xray", { model: state.model, messages: turns })).json();
    $("xray-frame").src = url;
    $("xray").hidden = false;
    $("close-xray").focus();
    status("");
  } catch (error) { status(error.message); }
}

// --- the user's actions ----------------------------------------------------------------------------------------------

function closeMenu() {
  $("sidebar").classList.remove("open");
  $("menu").setAttribute("aria-expanded", "false");
}
$("menu").onclick = () => $("menu").setAttribute("aria-expanded", $("sidebar").classList.toggle("open"));
$("new").onclick = () => { startConversation(); closeMenu(); $("text").focus(); };
$("stop").onclick = () => state.busy?.abort();
$("close-xray").onclick = () => { $("xray").hidden = true; $("text").focus(); };
$("composer").onsubmit = (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || state.busy) return;
  $("text").value = "";
  grow();
  ask(text);
};
function grow() { $("text").style.height = "auto"; $("text").style.height = `${$("text").scrollHeight + 2}px`; }
$("text").oninput = grow;
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("composer").requestSubmit(); }
};
document.onkeydown = (event) => {
  if (event.key !== "Escape") return;
  if (!$("xray").hidden) $("close-xray").click(); else if (state.busy) state.busy.abort(); else closeMenu();
};
$("open-settings").onclick = () => {
  const form = $("settings").querySelector("form");
  for (const [name, value] of Object.entries(state.settings)) form.elements[name].value = value;
  $("settings").returnValue = "";
  $("settings").showModal();
};
$("settings").onclose = () => {
  const chosen = $("settings").returnValue;
  if (chosen === "defaults") state.settings = { ...DEFAULTS };
  if (chosen === "save") {
    for (const [name, value] of new FormData($("settings").querySelector("form"))) {
      state.settings[name] = typeof DEFAULTS[name] === "number" ? Number(value) : value;
    }
  }
  save();
  if (chosen && !state.model) connect();
};
function askForKey() {
  $("key-note").textContent = state.key ? "The server refused this key." : "This server answers only with its API key.";
  $("key").value = "";
  if (!$("key-dialog").open) $("key-dialog").showModal();
}
$("key-form").onsubmit = () => { // the dialog closes by itself
  state.key = $("key").value.trim();
  try { sessionStorage.setItem(KEY, state.key); } catch { /* it is kept until the next reload */ }
  connect();
  $("text").focus();
};
async function connect() {
  try {
    const { data: [model] } = await (await call("v1/models")).json();
    state.model = model.id;
    $("model").textContent = `${model.id}, context ${model.context.toLocaleString("en")}`;
    status("");
  } catch (error) { status(error instanceof TypeError ? "The server does not answer." : error.message); }
}

startConversation();
connect();
$("text").focus();
