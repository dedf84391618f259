// The conversation. Whatever the model or the user writes stays text: nothing is ever parsed as HTML.

import { Unauthorized } from "./api.js";
import { ask } from "./answer.js";
import * as format from "./format.js";
import { samplingOf } from "./sampling.js";

export class Chat {
  // unauthorized(): asks for the token, and resolves when there is one.
  constructor(find, pace, unauthorized) {
    Object.assign(this, { find, pace, unauthorized });
    this.chats = true;
    this.messages = [];
    this.aborter = null;
    find("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    find("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    find("stop").addEventListener("click", () => this.aborter?.abort());
    find("clear").addEventListener("click", () => this.clear());
  }

  topology(about) {
    this.chats = about.chat;
    this.find("system").disabled = !about.chat;
    this.find("prompt").placeholder = about.chat ? "Message" : "Text to continue (this model has no chat template)";
    const most = this.find("max_tokens");
    most.max = about.context;
    most.value = Math.max(1, Math.min(most.valueAsNumber || 1, about.context >> 1));
  }

  send() {
    const content = this.find("prompt").value;
    if (this.aborter || !content.trim()) return;
    this.find("prompt").value = "";
    this.messages.push({ role: "user", content });
    this.bubble("user", content);
    this.answer();
  }

  regenerate() {
    if (this.aborter || this.messages.at(-1)?.role !== "assistant") return;
    this.messages.pop();
    this.find("messages").lastElementChild.remove();
    this.answer();
  }

  clear() {
    this.aborter?.abort();
    this.messages = [];
    this.find("messages").replaceChildren(this.find("empty") ?? this.empty);
    this.fail("");
    this.find("prompt").focus();
  }

  async answer() {
    const { bubble, text } = this.bubble("assistant", "");
    bubble.classList.add("running");
    const reply = { role: "assistant", content: "" };
    const asked = this.asked();
    this.messages.push(reply);
    this.run(true);
    const { signal } = this.aborter;
    const written = text.appendChild(document.createTextNode(""));
    const write = () => {
      const more = reply.content.trimStart().slice(written.length);
      if (!more) return;
      written.appendData(more);
      this.follow();
    };
    const piece = (more) => {
      reply.content += more;
      this.pace.ask(write);
    };
    let stats = null;
    try {
      stats = await this.ask(asked, signal, piece);
    } catch (error) {
      if (!signal.aborted) this.fail(error.message || "the server cannot be reached");
    }
    write();
    bubble.classList.remove("running");
    this.run(false);
    if (bubble.isConnected) this.note(bubble, noteOf(stats, signal.aborted), reply);
  }

  asked() {
    const system = this.find("system").value.trim();
    const first = system && this.chats ? [{ role: "system", content: system }] : [];
    const said = this.messages.filter(({ content }) => content);
    return { chats: this.chats, messages: [...first, ...said], fields: samplingOf(this.find) };
  }

  async ask(asked, signal, piece) {
    this.fail("");
    for (;;) {
      try {
        return await ask({ ...asked, signal, piece });
      } catch (error) {
        if (!(error instanceof Unauthorized)) throw error;
        await this.unauthorized();
      }
    }
  }

  run(isRunning) {
    this.aborter = isRunning ? new AbortController() : null;
    this.find("send").hidden = isRunning;
    this.find("stop").hidden = !isRunning;
    for (const button of document.querySelectorAll(".again")) button.remove();
  }

  bubble(role, content) {
    const list = this.find("messages");
    const empty = this.find("empty");
    if (empty) {
      this.empty = empty;
      empty.remove();
    }
    const bubble = make("article", `message ${role}`);
    bubble.ariaLabel = role === "user" ? "You" : "Model";
    const text = make("div", "text");
    text.textContent = content;
    bubble.append(text);
    list.append(bubble);
    this.follow(true);
    return { bubble, text };
  }

  note(bubble, words, reply) {
    const notes = make("div", "notes");
    const said = make("span", "");
    said.textContent = words;
    const again = make("button", "quiet again", "Regenerate");
    again.addEventListener("click", () => this.regenerate());
    const copy = make("button", "quiet", "Copy");
    copy.addEventListener("click", () => navigator.clipboard?.writeText(reply.content));
    notes.append(said, again, copy);
    bubble.append(notes);
    this.follow();
  }

  // Keep the end in view, unless the reader has scrolled away from it.
  follow(always = false) {
    const list = this.find("messages");
    const below = list.scrollHeight - list.scrollTop - list.clientHeight;
    if (always || below < 120) list.scrollTop = list.scrollHeight;
  }

  fail(reason) {
    const told = this.find("failure");
    told.textContent = reason;
    told.hidden = !reason;
  }
}

function noteOf(stats, stopped) {
  if (!stats) return stopped ? "stopped" : "failed";
  const rate = format.speed(stats.tokens / stats.seconds);
  const end = stats.finish === "length" ? ", cut at its limit" : "";
  return `${stats.tokens} tokens, ${rate} tokens/s, first after ${Math.round(stats.first)} ms${end}`;
}

function make(kind, classes, words = "") {
  const element = document.createElement(kind);
  element.className = classes;
  if (kind === "button") element.type = "button";
  element.textContent = words;
  return element;
}
