// The page: a chat, and beside it the experts at work.

import { Chat } from "./chat.js";
import { Feed } from "./feed.js";
import { LivePanel } from "./live.js";
import { Pace } from "./pace.js";
import { TokenDialog } from "./token.js";

const STATES = {
  live: "live",
  lost: "connection lost, trying again",
  locked: "waiting for the token",
};

const find = (id) => document.getElementById(id);
const dialog = new TokenDialog(find);
const unauthorized = () => dialog.ask();
const pace = new Pace();
const chat = new Chat(find, pace, unauthorized);
const panel = new LivePanel(find, pace);

const feed = new Feed({
  unauthorized,
  topology(about) {
    find("model").textContent = about.model;
    document.title = `${about.model} · ExpertFlow`;
    chat.topology(about);
    panel.topology(about);
  },
  step: (step) => panel.step(step),
  state(name) {
    find("status").textContent = STATES[name];
    find("status").dataset.state = name;
  },
});

for (const view of ["chat", "live"]) {
  find(`show-${view}`).addEventListener("click", () => {
    document.body.dataset.view = view;
    for (const other of ["chat", "live"]) find(`show-${other}`).ariaPressed = String(other === view);
  });
}

feed.attend();
