// Drives a server with OpenAI's npm client, and prints what came back as one line of JSON.
// usage: node openai_npm.cjs URL MODEL, with the package in NODE_PATH

const OpenAI = require("openai");

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "none", maxRetries: 0 });
const hello = [{ role: "user", content: "Hello" }];
const chat = { model, messages: hello, temperature: 0, max_tokens: 12 };
const sampled = { model, messages: hello, max_tokens: 10, n: 2, seed: 3, logprobs: true, top_logprobs: 2 };
const tool = { type: "function", function: { name: "sing", parameters: { type: "object", properties: {} } } };
const found = {};

async function error(call) {
  try {
    await call();
    return null;
  } catch (e) {
    return { kind: e.constructor.name, status: e.status, param: e.param, code: e.code, message: e.error?.message };
  }
}

async function collect(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

async function main() {
  found.models = (await client.models.list()).data.map((one) => one.id);
  found.model = (await client.models.retrieve(model)).id;

  const whole = await client.chat.completions.create(chat);
  found.whole = whole;
  found.again = await client.chat.completions.create({
    ...chat,
    messages: [...hello, whole.choices[0].message, { role: "user", content: [{ type: "text", text: "And?" }] }],
  });
  found.chunks = await collect(
    await client.chat.completions.create({ ...chat, stream: true, stream_options: { include_usage: true } }),
  );
  const runner = client.chat.completions.stream(chat);
  let text = "";
  runner.on("content", (delta) => (text += delta));
  found.collected = await runner.finalChatCompletion();
  found.content = text;
  found.sampled = await client.chat.completions.create(sampled);
  found.sampledStream = await client.chat.completions.stream(sampled).finalChatCompletion();
  found.response = (await client.chat.completions.create(chat).withResponse()).response.status;

  const prompt = { model, prompt: ["The whale", "and the moon"], max_tokens: 6, temperature: 0, echo: true, logprobs: 1 };
  found.completion = await client.completions.create(prompt);
  found.pieces = await collect(await client.completions.create({ ...prompt, stream: true }));

  const abandoned = await client.chat.completions.create({ ...chat, max_tokens: 80, seed: 1, stream: true });
  for await (const _ of abandoned) break; // the client closes the connection

  found.errors = {
    model: await error(() => client.chat.completions.create({ ...chat, model: "gpt-4" })),
    retrieve: await error(() => client.models.retrieve("gpt-4")),
    temperature: await error(() => client.chat.completions.create({ ...chat, temperature: 3 })),
    stream: await error(() => client.chat.completions.create({ ...chat, stream: true, n: 99 })),
    tools: await error(() => client.chat.completions.create({ ...chat, tools: [tool] })),
    format: await error(() => client.chat.completions.create({ ...chat, response_format: { type: "json_object" } })),
    image: await error(() =>
      client.chat.completions.create({
        ...chat,
        messages: [{ role: "user", content: [{ type: "image_url", image_url: { url: "data:," } }] }],
      }),
    ),
    runTools: await error(() =>
      client.chat.completions
        .runTools({ ...chat, tools: [{ ...tool, function: { ...tool.function, function: () => "", parse: JSON.parse } }] })
        .finalContent(),
    ),
    responses: await error(() => client.responses.create({ model, input: "Hello" })),
    embeddings: await error(() => client.embeddings.create({ model, input: "Hello" })),
    files: await error(() => client.files.list()),
  };
  console.log(JSON.stringify(found));
}

main();
