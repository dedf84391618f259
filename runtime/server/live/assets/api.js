// The server's API: the token, requests, and answers that come as events.

const KEPT = "expertflow-token";

export class Unauthorized extends Error {}

let token = sessionStorage.getItem(KEPT) ?? "";

export function setToken(given) {
  token = given;
  sessionStorage.setItem(KEPT, given);
}

// An answer with status 200. Throws Unauthorized, or an Error that says what the server said.
export async function request(path, { body, signal } = {}) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const asked = { headers, signal, cache: "no-store" };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(asked, { method: "POST", body: JSON.stringify(body) });
  }
  const response = await fetch(path, asked);
  if (response.status === 401) throw new Unauthorized();
  if (!response.ok) throw new Error(await reasonOf(response));
  return response;
}

async function reasonOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

// The server-sent events of an answer, as { name, data }. rest(): milliseconds until what has come
// since is read: to be woken for every token would cost more than all else.
export async function* eventsOf(response, rest = () => 0) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (held + decoder.decode(value, { stream: true })).split("\n\n");
      held = blocks.pop();
      for (const block of blocks) {
        const event = parse(block);
        if (event.data) yield event;
      }
      const wait = rest();
      if (wait) await new Promise((done) => setTimeout(done, wait));
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parse(block) {
  const event = { name: "message", data: "" };
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) event.name = line.slice(7);
    if (line.startsWith("data: ")) event.data += line.slice(6);
  }
  return event;
}
