// The stream of events about the steps: followed, and taken up again where it breaks.

import { Unauthorized, eventsOf, request } from "./api.js";

const PATH = "v1/expertflow/events";
const SOONEST = 500;
const LATEST = 8000;

export class Feed {
  // on: { topology(data), step(data), state(name), unauthorized() -> a promise to wait for }
  constructor(on) {
    this.on = on;
    this.wait = SOONEST;
    this.aborter = null;
    document.addEventListener("visibilitychange", () => this.attend());
    window.addEventListener("pagehide", () => this.aborter?.abort());
  }

  // A page that nobody sees lets the steps run unwatched.
  attend() {
    if (document.hidden) this.aborter?.abort();
    else if (!this.aborter) this.follow();
  }

  async follow() {
    this.aborter = new AbortController();
    const { signal } = this.aborter;
    while (!signal.aborted) {
      try {
        await this.read(signal);
      } catch (error) {
        if (error instanceof Unauthorized) {
          this.on.state("locked");
          await this.on.unauthorized();
          this.wait = SOONEST;
          continue;
        }
      }
      if (signal.aborted) break;
      this.on.state("lost");
      await new Promise((done) => setTimeout(done, this.wait));
      this.wait = Math.min(2 * this.wait, LATEST);
    }
    this.aborter = null;
    if (!document.hidden) this.attend();
  }

  async read(signal) {
    const response = await request(PATH, { signal });
    this.on.state("live");
    this.wait = SOONEST;
    for await (const { name, data } of eventsOf(response)) {
      if (name === "topology") this.on.topology(JSON.parse(data));
      if (name === "step") this.on.step(JSON.parse(data));
    }
  }
}
