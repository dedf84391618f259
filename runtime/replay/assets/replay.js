// The page: a text, and beside it the experts of the step that is shown.

import { Chart } from "./chart.js";
import * as format from "./format.js";
import { ExpertMap } from "./map.js";
import { Player } from "./player.js";
import { Recording } from "./recording.js";
import { Tokens } from "./tokens.js";

const WINDOW = 16; // steps that a point of the charts is the mean of
const TRAIL = 8; // steps whose experts fade behind the one that is shown

const find = (id) => document.getElementById(id);
const all = (kind) => document.querySelectorAll(kind);

class Page {
  constructor(recording) {
    this.recording = recording;
    const [own, lru] = recording.runs;
    Object.assign(this, { own, lru: lru ?? null, shown: own, step: null });
    const { expert_bytes: bytes } = recording;
    this.amount = bytes ? (loads) => format.bytes(loads * bytes) : (loads) => `${format.speed(loads)} experts`;
    this.map = new ExpertMap(find("map"), find("cell"));
    this.map.shape(recording.layers, recording.experts);
    this.rates = new Chart(find("rate-chart"), { format: (share) => `${Math.round(100 * share)} %`, most: 1 });
    this.moved = new Chart(find("moved-chart"), { format: bytes ? format.bytes : (loads) => format.speed(loads) });
    this.ratePoints = this.points((run, from, to) => run.rate(from, to));
    this.movedPoints = this.points((run, from, to) => this.perToken(run, from, to));
    this.describe();
    this.tokens = new Tokens(find("text"), recording, (token) => this.player.go(recording.stepOf(token)));
    this.tokens.tint(own);
    this.player = new Player(find, recording.steps, (step) => this.show(step));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      for (const part of [this.map, this.rates, this.moved]) part.draw();
    });
    this.player.go(0);
  }

  describe() {
    const { recording, own } = this;
    const total = recording.layers * recording.experts;
    find("model").textContent = `${recording.model} · ${recording.layers} x ${recording.experts}, top-${recording.top_k}`;
    document.title = `${recording.model} · ExpertFlow replay`;
    const count = recording.tokenIds.length;
    const cut = count < recording.of_tokens ? `the first ${count} of ${recording.of_tokens} tokens` : `${count} tokens`;
    find("document").textContent =
      `${recording.label}: document ${recording.document} (of ${recording.documents}) in ${recording.trace}, ${cut}`;
    find("remark").textContent = recording.remark;
    find("remark").hidden = !recording.remark;
    find("reader-title").textContent = recording.texts ? "The text" : "Token ids";
    find("about").textContent = `${own.slots} of ${total} experts fit · policy ${own.policy}`;
    find("predicted-key").hidden = !recording.guesses;
    for (const unit of all(".unit")) unit.textContent = recording.expert_bytes ? "Bytes" : "Experts";
    for (const name of all(".policy")) name.textContent = own.policy;
    for (const key of all(".beside-lru")) key.hidden = !this.lru;
    this.offer();
  }

  // The caches that the map can show.
  offer() {
    find("choice").hidden = !this.lru;
    for (const run of this.recording.runs) find("shown").add(new Option(run.policy));
    find("shown").addEventListener("change", () => {
      this.shown = this.recording.runs[find("shown").selectedIndex];
      this.tokens.tint(this.shown);
      this.trail(this.step);
      this.name(this.step);
    });
  }

  show(step) {
    if (step === this.step) return;
    this.tokens.show(step);
    if (this.step !== null && step === this.step + 1) this.mark(step);
    else this.trail(step);
    this.step = step;
    this.name(step);
    this.tiles(step);
    this.rates.put(this.ratePoints, step);
    this.moved.put(this.movedPoints, step);
  }

  // The map as the steps before have left it.
  trail(step) {
    this.map.forget();
    for (let at = Math.max(0, step - TRAIL); at <= step; at += 1) this.mark(at);
  }

  mark(step) {
    const used = this.recording.usedIn(step);
    const missed = new Set(this.shown.missed[step]);
    const predicted = this.recording.predictedIn(step);
    const residents = this.shown.residents[step];
    this.map.mark([
      (key) => residents[key], (key) => used.has(key) && !missed.has(key),
      (key) => missed.has(key), (key) => predicted.has(key),
    ]);
  }

  name(step) {
    const count = this.recording.tokensIn(step);
    const first = this.recording.firsts[step];
    const subject = count === 1 ? `token ${first + 1}` : `a prompt of ${count} tokens`;
    this.map.present(subject);
    find("map-title").textContent = `Layers down, experts across: ${subject}`;
  }

  tiles(step) {
    const { own, lru } = this;
    const used = this.recording.counts[step];
    const hits = (run) => used - run.missed[step].length;
    put("hits", `${hits(own)} of ${used}`, lru ? `LRU ${hits(lru)}` : "");
    put("rate", format.percent(own.rate(0, step + 1)), lru ? `LRU ${format.percent(lru.rate(0, step + 1))}` : "");
    put("moved", this.amount(own.loads[step + 1]), lru ? `LRU ${this.amount(lru.loads[step + 1])}` : "");
    if (this.recording.guesses) put("recall", format.percent(this.recording.recallIn(step)), "of the used experts");
    else put("recall", "off", "no predictor");
  }

  points(value) {
    return Array.from({ length: this.recording.steps }, (_, step) => {
      const from = Math.max(0, step + 1 - WINDOW);
      return [value(this.own, from, step + 1), this.lru && value(this.lru, from, step + 1)];
    });
  }

  perToken(run, from, to) {
    const { firsts, expert_bytes: bytes } = this.recording;
    return ((run.loads[to] - run.loads[from]) * (bytes ?? 1)) / (firsts[to] - firsts[from]);
  }
}

function put(id, value, beside) {
  find(id).textContent = value;
  find(`${id}-beside`).textContent = beside || "\u00a0";
}

new Page(new Recording(JSON.parse(find("recording").textContent)));
