// One answer of the model, asked for and read as it comes.

import { eventsOf, request } from "./api.js";

const REST = 100; // ms between two looks at what has come, after the first text

// Calls piece(text) for each piece. Returns { tokens, seconds, first, finish }; throws as request does.
export async function ask({ chats, messages, fields, signal, piece }) {
  const began = performance.now();
  const stats = { tokens: 0, seconds: 0, first: 0, finish: "" };
  const body = { ...fields, stream: true, stream_options: { include_usage: true } };
  if (chats) body.messages = messages;
  else body.prompt = messages.map((message) => message.content).join("");
  const response = await request(chats ? "v1/chat/completions" : "v1/completions", { body, signal });
  for await (const { data } of eventsOf(response, () => (stats.first ? REST : 0))) {
    if (data === "[DONE]") break;
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message);
    const text = textOf(event.choices?.[0]);
    stats.first ||= text ? performance.now() - began : 0;
    if (text) piece(text);
    stats.finish = event.choices?.[0]?.finish_reason ?? stats.finish;
    stats.tokens = event.usage?.completion_tokens ?? stats.tokens;
  }
  stats.seconds = (performance.now() - began) / 1000;
  return stats;
}

function textOf(choice) {
  return choice?.delta?.content ?? choice?.text ?? "";
}
