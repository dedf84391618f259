// The map: a row a layer, a cell an expert.

import { colour, fitted } from "./canvas.js";

const LABELS = 26;
const FADE = 0.7;

export class ExpertMap {
  constructor(canvas, told) {
    this.canvas = canvas;
    this.told = told;
    this.layers = this.experts = 0;
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => { this.told.textContent = "\u00a0"; });
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
  }

  shape(layers, experts) {
    this.layers = layers;
    this.experts = experts;
    const count = layers * experts;
    this.resident = new Uint8Array(count);
    this.used = new Uint8Array(count); // 1 hit, 2 missed
    this.predicted = new Uint8Array(count);
    this.heat = new Float32Array(count);
    this.draw();
  }

  show(step) {
    this.mark([step.residents, step.hit, step.missed, step.predicted].map(bits));
    this.present("the running token");
  }

  // The next step, by tests of a key; what was used before it fades.
  mark([isResident, isHit, isMissed, isPredicted]) {
    for (let key = 0; key < this.resident.length; key += 1) {
      this.heat[key] = this.used[key] ? 1 : this.heat[key] * FADE;
      this.resident[key] = isResident(key);
      this.predicted[key] = isPredicted(key);
      this.used[key] = isHit(key) ? 1 : isMissed(key) ? 2 : 0;
    }
  }

  // Forget what was used before.
  forget() {
    this.used.fill(0);
    this.heat.fill(0);
  }

  // Draw the marked step. subject: what it ran.
  present(subject) {
    const count = (use) => keysWhere(this.used, (one) => one === use).length;
    this.canvas.ariaLabel =
      `Map of ${this.layers} layers with ${this.experts} experts each: ` +
      `${subject} hit ${count(1)} and missed ${count(2)}`;
    this.draw();
  }

  // Where the cells lie, in CSS pixels.
  grid() {
    const width = this.canvas.parentElement.clientWidth;
    const across = (width - LABELS) / this.experts;
    const down = Math.max(4, Math.min(1.4 * across, 28, Math.max(9, 400 / this.layers)));
    return { width, across, down, height: Math.ceil(down * this.layers) + 1 };
  }

  draw() {
    if (!this.layers || !this.canvas.parentElement.clientWidth) return;
    const { width, across, down, height } = this.grid();
    const pen = fitted(this.canvas, width, height);
    const gap = across > 6 ? 1 : across > 3 ? 0.5 : 0;
    const round = Math.min(across, down) > 9 ? 3 : 0;
    const boxOf = (key) => [
      LABELS + (key % this.experts) * across, Math.floor(key / this.experts) * down,
      across - gap, down - gap, round,
    ];
    for (const [name, alpha, keys] of this.shades()) this.fill(pen, name, alpha, keys.map(boxOf));
    this.outline(pen, keysWhere(this.predicted, (flag) => flag).map(boxOf));
    this.label(pen, down);
  }

  // The cells by their look: [colour, opacity, keys], those below first.
  shades() {
    const { resident, used, heat } = this;
    const lately = [1, 2, 3].map((level) => [
      "hit", 0.15 * level,
      keysWhere(used, (use, key) => !use && resident[key] && Math.round(3 * heat[key]) === level),
    ]);
    return [
      ["absent", 1, keysWhere(resident, (flag) => !flag)],
      ["resident", 1, keysWhere(resident, (flag) => flag)],
      ...lately,
      ["hit", 1, keysWhere(used, (use) => use === 1)],
      ["missed", 1, keysWhere(used, (use) => use === 2)],
    ];
  }

  // One path a colour: a path a cell would take most of a small machine's time.
  fill(pen, name, alpha, boxes) {
    pen.globalAlpha = alpha;
    pen.fillStyle = colour(name);
    pen.beginPath();
    for (const box of boxes) {
      if (box[4]) pen.roundRect(...box);
      else pen.rect(...box.slice(0, 4));
    }
    pen.fill();
    pen.globalAlpha = 1;
  }

  outline(pen, boxes) {
    pen.strokeStyle = colour("predicted");
    pen.beginPath();
    for (const [x, y, w, h, round] of boxes) {
      const line = Math.max(1, Math.min(2, w / 6));
      pen.lineWidth = line;
      pen.roundRect(x + line / 2, y + line / 2, w - line, h - line, Math.max(0, round - 1));
    }
    pen.stroke();
  }

  label(pen, down) {
    pen.fillStyle = colour("dim");
    pen.font = "11px system-ui, sans-serif";
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    const every = Math.ceil(13 / down);
    for (let layer = 0; layer < this.layers; layer += every) {
      pen.fillText(String(layer), LABELS - 7, (layer + 0.5) * down);
    }
  }

  point(event) {
    const { across, down } = this.grid();
    const expert = Math.floor((event.offsetX - LABELS) / across);
    const layer = Math.floor(event.offsetY / down);
    if (!(expert >= 0 && expert < this.experts && layer >= 0 && layer < this.layers)) return;
    const key = layer * this.experts + expert;
    const used = ["not used by this token", "a hit", "missed"][this.used[key]];
    const parts = [used, this.resident[key] ? "in a slot" : "in no slot"];
    if (this.predicted[key]) parts.push("predicted");
    this.told.textContent = `Layer ${layer}, expert ${expert}: ${parts.join(", ")}`;
  }
}

function keysWhere(flags, holds) {
  const keys = [];
  for (let key = 0; key < flags.length; key += 1) if (holds(flags[key], key)) keys.push(key);
  return keys;
}

// The flags of a bitmap in base64, the lowest bit of each byte first; null has none.
function bits(packed) {
  const bytes = atob(packed ?? "");
  return (key) => (bytes.charCodeAt(key >> 3) >> (key & 7)) & 1;
}
