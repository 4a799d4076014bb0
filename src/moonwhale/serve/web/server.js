// Talks to the server, and says in words what went wrong.
import { state } from "./state.js";

// An error whose message is for the user.
export class Failure extends Error {}
export class KeyNeeded extends Failure {}

const GONE = "The server does not answer. Is “moonwhale serve” still running?";
const STRANGE = "Something answers, but not as moonwhale does. Is this the right address?";
const BROKEN = "The connection broke off before the answer was complete.";

// Sends a GET, or with a body a POST. Raises a Failure, or an AbortError if the signal aborts.
export async function call(path, body, signal) {
  const key = state.key ? { authorization: `Bearer ${state.key}` } : {};
  const headers = { "content-type": "application/json", ...key };
  const post = body ? { method: "POST", body: JSON.stringify(body) } : {};
  const response = await orFailure(GONE, fetch(path, { headers, signal, ...post }));
  if (response.ok) return response;
  const message = await response.json().then((said) => said.error?.message, () => "");
  if (response.status === 401) throw new KeyNeeded("The server wants its API key.");
  throw new Failure(inWords(response.status, message));
}

function inWords(status, message) {
  if (status === 503 && !message) return "The server takes no more connections for now. Try again soon.";
  const said = message && sentence(message);
  if (!said) return `${STRANGE} (Status ${status})`;
  if (status === 429) return `The server is busy. ${said}`;
  if (status === 503) return `The model is not available. ${said} If the server has ended, start it again.`;
  return said;
}
function sentence(text) { return `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`; }

async function orFailure(words, promise) {
  try { return await promise; } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(words);
  }
}

function parsed(text) {
  try { return JSON.parse(text); } catch { throw new Failure(STRANGE); }
}

// Returns the model card of the server, which is asked only if it is not known. Raises as `call`.
export async function connect(signal) {
  if (!state.model) {
    const found = await orFailure(STRANGE, (await call("v1/models", null, signal)).json());
    const [model] = found?.data ?? [];
    if (!model?.context) throw new Failure(STRANGE); // another server, such as Ollama, has no context in its card
    state.model = model;
  }
  return state.model;
}

// Yields the server-sent events of a response. A read may end in the middle of an event.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await orFailure(BROKEN, reader.read());
    if (done) throw new Failure(BROKEN);
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      const event = parsed(line.slice("data: ".length));
      if (event.error) throw new Failure(inWords(event.error.type === "server_error" ? 503 : 400, event.error.message));
      yield event;
    }
  }
}
