// The panel beside the chat: map, tiles and charts, from the stream of events.

import { Chart } from "./chart.js";
import * as format from "./format.js";
import { ExpertMap } from "./map.js";

const WINDOW = 1200; // ms, of which speed and charts show the mean
const CHARTS = 1000; // ms between two drawings of what changes little

export class LivePanel {
  constructor(find, pace) {
    Object.assign(this, { find, pace });
    this.paint = this.paint.bind(this);
    this.chartsDue = 0;
    this.map = new ExpertMap(find("map"), find("cell"));
    this.rates = new Chart(find("rate-chart"), { format: (share) => `${Math.round(100 * share)} %`, most: 1 });
    this.moved = new Chart(find("moved-chart"), { format: format.bytes });
    this.recent = [];
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
  }

  redraw() {
    for (const part of [this.map, this.rates, this.moved]) part.draw();
  }

  topology(about) {
    this.about = about;
    const { slots, total_experts: all, policy, predictor } = about;
    this.find("about").textContent =
      `${slots} of ${all} experts fit (${format.bytes(slots * about.expert_bytes)}) · policy ${policy}`;
    this.find("predicted-key").hidden = !predictor;
    for (const name of document.querySelectorAll(".policy")) name.textContent = policy;
    if (!predictor) this.put("recall", "off", "no predictor");
    if (this.map.layers !== about.layers || this.map.experts !== about.experts) {
      this.map.shape(about.layers, about.experts);
    }
  }

  step(step) {
    const newest = step.counts;
    const last = this.recent.at(-1);
    if (last && newest.steps < last.steps) this.restart();
    this.recent.push(newest);
    while (this.recent.length > 2 && newest.seconds - this.recent[1].seconds > WINDOW / 1000) this.recent.shift();
    this.newest = step;
    this.map.show(step);
    this.extend(newest);
    this.pace.ask(this.paint);
  }

  // Draw what the newest step changes; charts, and what needs a layout, now and then.
  paint() {
    this.map.present("the running token");
    this.tiles(this.newest, this.newest.counts);
    const wait = this.chartsDue - performance.now();
    clearTimeout(this.later);
    if (wait > 0) this.later = setTimeout(() => this.pace.ask(this.paint), wait);
    else this.paintCharts();
  }

  paintCharts() {
    this.chartsDue = performance.now() + CHARTS;
    this.rates.draw();
    this.moved.draw();
    this.write("map-title", titleOf(this.newest));
    const { counts } = this.newest;
    if (counts.lru_hits + counts.lru_misses > 0) this.write("total", totalOf(counts));
  }

  restart() {
    this.recent = [];
    this.rates.clear();
    this.moved.clear();
  }

  extend(newest) {
    const since = difference(this.recent[0], newest);
    this.rates.add(rateOf(since), lruRateOf(since));
    this.moved.add(since.bytes / tokensOf(since), since.lru_bytes / tokensOf(since));
  }

  tiles(step, newest) {
    const since = difference(this.recent[0], newest);
    if (since.tokens > 0 && since.busy > 0) {
      this.put("speed", `${format.speed(since.tokens / since.busy)}`, "tokens/s in steps");
    }
    if (newest.lru_hits + newest.lru_misses > 0) {
      const tokens = tokensOf(newest);
      this.put("rate", format.percent(rateOf(newest)), `LRU ${format.percent(lruRateOf(newest))}`);
      const other = `LRU ${format.bytes(newest.lru_bytes / tokens)}`;
      this.put("moved", format.bytes(newest.bytes / tokens), other);
    }
    if (step.recall !== null) this.put("recall", format.percent(step.recall), `recall@${this.about.top_k}`);
    const { process, device } = step.memory;
    const other = device === null ? "this process" : `GPU; process ${format.bytes(process)}`;
    this.put("memory", format.bytes(device ?? process), other);
  }

  put(id, value, beside) {
    this.write(id, value);
    this.write(`${id}-beside`, beside);
  }

  write(id, words) {
    const place = this.find(id);
    if (place.textContent !== words) place.textContent = words;
  }
}

function titleOf(step) {
  const rest = step.sequences - step.decoded;
  const parts = [];
  if (step.decoded) parts.push(step.decoded === 1 ? "the running token" : `${step.decoded} tokens of as many texts`);
  if (rest) parts.push(rest === 1 ? "a prompt" : `${rest} prompts`);
  return `Layers down, experts across: ${parts.join(" and ")}`;
}

function totalOf(counts) {
  const { tokens, prompt_tokens: prompt, bytes, lru_bytes: lru } = counts;
  const share = lru ? 1 - bytes / lru : 0;
  const compared = share >= 0 ? `${format.percent(share)} less` : `${format.percent(-share)} more`;
  return (
    `Since it is watched: ${format.whole(tokens)} tokens generated and ${format.whole(prompt)} of prompts read; ` +
    `${format.bytes(bytes)} moved, ${compared} than LRU would have with as many slots (${format.bytes(lru)}).`
  );
}

function difference(before, after) {
  return Object.fromEntries(Object.entries(after).map(([name, count]) => [name, count - before[name]]));
}

const rateOf = ({ hits, late, misses }) => hits / (hits + late + misses);
const lruRateOf = ({ lru_hits: hits, lru_misses: misses }) => hits / (hits + misses);
const tokensOf = ({ tokens, prompt_tokens: prompt }) => Math.max(tokens + prompt, 1);
