// The npm package `openai` against a running server: node npm_client.mjs ADDRESS
import OpenAI from "openai";
import assert from "node:assert";

const model = "moe-8x32";
const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
assert.equal((await client.models.retrieve(model)).id, model);
const ask = { model, prompt: "The history of the town", max_tokens: 12, temperature: 0 };
const whole = (await client.completions.create(ask)).choices[0].text;
let pieces = "";
for await (const event of await client.completions.create({ ...ask, stream: true })) pieces += event.choices[0].text;
assert.equal(pieces, whole);
const messages = [{ role: "user", content: "Hello" }];
const chat = await client.chat.completions.create({ model, messages, max_tokens: 8, temperature: 0 });
let said = "";
const options = { stream: true, stream_options: { include_usage: true } };
for await (const event of await client.chat.completions.create({ model, messages, max_tokens: 8, temperature: 0, ...options }))
  said += event.choices[0]?.delta?.content ?? "";
assert.equal(said, chat.choices[0].message.content);
await assert.rejects(client.completions.create({ ...ask, model: "none" }), OpenAI.NotFoundError);
await assert.rejects(client.completions.create({ ...ask, max_tokens: -1 }), OpenAI.BadRequestError);
console.log("openai (npm): models, completions, chat, streams, errors");
