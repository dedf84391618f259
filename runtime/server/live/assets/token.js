// The dialog that asks for the server's bearer token.

import { setToken } from "./api.js";

export class TokenDialog {
  constructor(find) {
    this.find = find;
    this.waiting = null;
    find("ask-token").addEventListener("cancel", (event) => event.preventDefault());
    find("token-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.take();
    });
  }

  // Resolves when a token was given. Whoever asks while it is open waits for the same one.
  ask() {
    this.waiting ??= new Promise((done) => {
      this.done = done;
      this.find("token-wrong").hidden = !this.given;
      this.find("ask-token").showModal();
    });
    return this.waiting;
  }

  take() {
    setToken(this.find("token").value.trim());
    this.find("token").value = "";
    this.find("ask-token").close();
    this.given = true;
    this.waiting = null;
    this.done();
  }
}
