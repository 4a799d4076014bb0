// What each head predicts at the chosen token, and what had been guessed about the token itself.
function drawPredictions() {
  const columns = make("div", "columns"),
    heads = S.predictions.map((rows, k) => ({ rows, k }));
  for (const { rows, k } of heads) {
    const column = make("div", "prediction"),
      target = token + 1 + k;
    column.append(make("h3", "", k ? `MTP module ${k}, for token ${target}` : `Main head, for token ${target}`));
    if (token >= rows.length) column.append(paragraph(`It would read token ${token + k}, which the text does not have.`));
    else {
      const names = R.tokens.slice(token + 1, token + 1 + k).map(quote);
      column.append(k ? paragraph("It has also read ", ...names, ".") : paragraph("It has read the text up to ", quote(R.tokens[token]), "."));
      column.append(
        bars(
          rows[token].map(([id, text, share]) => {
            const name = make("span", "", quote(text));
            if (id === R.ids[target]) name.append(make("b", "", " ←"));
            return { name, value: share, label: percent(share) };
          }),
          1,
        ),
      );
      column.append(
        target < T ? paragraph("The text has (←) ", quote(R.tokens[target]), ".") : paragraph("The text ends before this token."),
      );
    }
    columns.append(column);
  }
  const parts = [
    paragraph(
      "After ",
      quote(R.tokens[token]),
      ` (token ${token}), the most likely tokens of each head. All heads share one output matrix; the states ` +
        `that it reads differ.`,
    ),
    columns,
  ];
  if (!MODULES)
    parts[0] = paragraph(
      "After ",
      quote(R.tokens[token]),
      ` (token ${token}), the most likely next tokens. This model has no MTP module.`,
    );
  else parts.push(...guessesOf(token));
  fill("next", MODULES ? "Predictions of all heads" : "Prediction", ...parts);
}
function guessesOf(i) {
  const guesses = S.guesses[i],
    parts = [];
  parts.push(
    guesses.length
      ? paragraph("The chosen token itself, ", quote(R.tokens[i]), ", had been guessed by the modules as:")
      : paragraph("No MTP module could guess the chosen token itself: it is too close to the beginning."),
  );
  for (const g of guesses) {
    const verdict = g.held ? " ✓ accepted" : g.id === R.ids[i] ? " ✗ right, but after a wrong guess" : " ✗ wrong";
    parts.push(
      paragraph(
        `module ${g.depth}, ${g.depth + 1} tokens earlier: `,
        quote(g.text),
        ` (${percent(g.share)})`,
        make("span", g.held ? "good" : "bad", verdict),
      ),
    );
  }
  const { tested, held } = guessesHeld(S);
  if (tested)
    parts.push(
      paragraph(
        `In this text module 1 guessed ${held} of ${tested} tokens correctly (${percent(held / tested)}). A ` +
          `speculative decoder keeps such guesses.`,
      ),
    );
  return parts;
}
