// Other settings of the model, each with a recording of its own. A live page asks its server for more.
const NAMES = {
  num_experts_per_tok: ["expert", "experts", "per token"],
  moba_topk: ["MoBA block", "MoBA blocks", "per query"],
  moba_block_size: ["token", "tokens", "per MoBA block"],
};
const KEPT = 8; // recordings that a live page keeps

const settingName = (name, n) => `${NAMES[name][n === 1 ? 0 : 1]} ${NAMES[name][2]}`;
const chosenNames = () => Object.keys(R.limits);
const firstChoice = (recording, i) => recording.predictions[0][i][0][0]; // an id
function labelOf(recording) {
  const trained = R.recordings[0].settings,
    names = chosenNames();
  const changed = names.filter((name) => recording === R.recordings[0] || recording.settings[name] !== trained[name]);
  const text = changed.map((name) => `${recording.settings[name]} ${settingName(name, recording.settings[name])}`).join(", ");
  return recording === R.recordings[0] ? `as trained${text && `: ${text}`}` : text || "as trained, computed again";
}
function drawSettings() {
  if (!chosenNames().length) {
    fill(
      "settings",
      "Other settings",
      paragraph("Top-k, MoBA's k and its block size can be changed without training. This model has none of them."),
    );
    return;
  }
  const table = make(
    "table",
    "",
    make(
      "tr",
      "",
      ...["Setting", "Nats per token", "In the answer", "Guesses kept", "Same first choice"].map((text, i) =>
        make("th", i ? "n" : "", text),
      ),
    ),
  );
  for (const recording of R.recordings) {
    const select = button(labelOf(recording), () => showRow(recording)),
      { tested, held } = guessesHeld(recording);
    select.setAttribute("aria-pressed", recording === S);
    const answer = recording.surprise.slice(Math.max(0, R.prompt_tokens - 1));
    const same = R.ids.filter((_, i) => firstChoice(recording, i) === firstChoice(R.recordings[0], i)).length;
    const numbers = [
      T > 1 ? mean(recording.surprise).toFixed(3) : "–",
      answer.length ? mean(answer).toFixed(3) : "–",
      tested ? `${held} of ${tested}` : "–",
      `${same} of ${T}`,
    ];
    table.append(
      make("tr", recording === S ? "selected" : "", make("td", "", select), ...numbers.map((text) => make("td", "n", text))),
    );
  }
  const note = make("p", "bad");
  note.setAttribute("role", "status");
  fill(
    "settings",
    "Other settings",
    paragraph(
      "The same weights over the same text, with one number changed. Choose a row, and the whole page shows " +
        "that forward pass. Nats per token are the main head's mean loss, so lower is better.",
    ),
    make("div", "scroll", table),
    ...(R.live ? [settingsForm(), note] : [paragraph("The chat page's X-ray computes any other value.")]),
  );
}
// Shows a recording. A focus in this panel, which is drawn anew, goes to the row of the recording.
function showRow(recording) {
  const isElsewhere = !$("settings").contains(document.activeElement) && document.activeElement !== document.body;
  show(recording);
  if (!isElsewhere) $("settings").querySelector("[aria-pressed=true]").focus({ preventScroll: true });
}
function settingsForm() {
  const form = make("form");
  for (const name of chosenNames()) {
    const input = make("input"),
      [low, high] = R.limits[name];
    Object.assign(input, { type: "number", name, min: low, max: high, value: S.settings[name], required: true });
    form.append(make("label", "", `${settingName(name, 2)} (${low} to ${high})`, input));
  }
  const submit = make("button", "", "Compute");
  form.append(submit);
  form.onsubmit = async (event) => {
    event.preventDefault();
    const note = $("settings").querySelector("[role=status]"),
      focused = document.activeElement;
    note.textContent = "";
    submit.disabled = true;
    submit.textContent = "Computing…";
    const asked = Object.fromEntries([...new FormData(form)].map(([name, value]) => [name, Number(value)]));
    try {
      showRow(await recompute(asked));
    } catch (error) {
      const shown = $("settings").querySelector("[role=status]"); // the panel may have been drawn anew
      shown.textContent = error instanceof TypeError ? "The server does not answer." : error.message;
      submit.disabled = false;
      submit.textContent = "Compute";
      if (document.activeElement === document.body) focused.focus(); // a disabled button loses it
    }
  };
  return form;
}
async function recompute(asked) {
  const known = R.recordings.find((one) => chosenNames().every((name) => one.settings[name] === asked[name]));
  if (known) return known;
  const response = await fetch(location.pathname, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(asked),
  });
  if (!response.ok)
    throw new Error(
      await response.json().then(
        ({ error }) => error.message,
        () => `the server answered ${response.status}`,
      ),
    );
  const recording = unpack(await response.json());
  R.recordings.push(recording);
  if (R.recordings.length > KEPT) R.recordings.splice(1, 1);
  return recording;
}
