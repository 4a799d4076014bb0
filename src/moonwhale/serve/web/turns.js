// The turns of a conversation, as a model has learnt to read them: user and model in turn. An answer without a word,
// such as one stopped too early, would invite another one. It is left out, and its question joins the next one.

// Returns the turns of some messages, and for each turn the index of its first message.
export function asTurns(messages) {
  const turns = [], starts = [];
  for (const [index, { role, content }] of messages.entries()) {
    if (role === "assistant" && !content.trim()) continue;
    const last = turns.at(-1);
    if (last?.role === role) last.content += `\n\n${content}`;
    else {
      turns.push({ role, content });
      starts.push(index);
    }
  }
  return { turns, starts };
}
