// The map: a row a layer, a cell an expert.

import { colour, fitted, followWidth, snapped } from "./canvas.js";

const LABELS = 26;
const FADE = 0.7;

// A cell's look is the number of its shade, and a bit for the outline.
const ABSENT = 0;
const RESIDENT = 1; // and after it what was used lately, by level
const LEVELS = 3;
const HIT = RESIDENT + LEVELS + 1;
const MISSED = HIT + 1;
const PREDICTED = 8;
const NOT_DRAWN = 255;

// What a shade is painted with, one over the other: [colour, opacity].
const PAINTS = {
  [ABSENT]: [["absent", 1]],
  [RESIDENT]: [["resident", 1]],
  [HIT]: [["hit", 1]],
  [MISSED]: [["missed", 1]],
};
for (let level = 1; level <= LEVELS; level += 1) {
  PAINTS[RESIDENT + level] = [["resident", 1], ["hit", 0.15 * level]];
}

export class ExpertMap {
  constructor(canvas, told) {
    this.canvas = canvas;
    this.told = told;
    this.layers = this.experts = 0;
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => { this.told.textContent = "\u00a0"; });
    followWidth(this, canvas);
  }

  shape(layers, experts) {
    this.layers = layers;
    this.experts = experts;
    const count = layers * experts;
    this.resident = new Uint8Array(count);
    this.used = new Uint8Array(count); // 1 hit, 2 missed
    this.predicted = new Uint8Array(count);
    this.heat = new Float32Array(count);
    this.looks = new Uint8Array(count); // as drawn
    this.draw();
  }

  // Take in a step of the server; `present` shows it.
  show(step) {
    this.mark([step.residents, step.hit, step.missed, step.predicted].map(bits));
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

  // Draw what the marked step changes. subject: what it ran.
  present(subject) {
    const count = (use) => this.used.reduce((sum, one) => sum + (one === use), 0);
    this.canvas.ariaLabel =
      `Map of ${this.layers} layers with ${this.experts} experts each: ` +
      `${subject} hit ${count(1)} and missed ${count(2)}`;
    if (this.scale !== window.devicePixelRatio) this.draw();
    else this.paint();
  }

  // Where the cells lie, in CSS pixels.
  grid() {
    const across = (this.width - LABELS) / this.experts;
    const down = Math.max(4, Math.min(1.4 * across, 28, Math.max(9, 400 / this.layers)));
    return { across, down, height: Math.ceil(down * this.layers) + 1 };
  }

  // Draw all of it anew.
  draw() {
    this.pen = null;
    if (!this.layers || !this.width) return;
    const { across, down, height } = this.grid();
    this.scale = window.devicePixelRatio;
    this.pen = fitted(this.canvas, this.width, height);
    this.gap = across > 6 ? snapped(1) : across > 3 ? 1 / this.scale : 0; // whole pixels of the screen
    this.round = Math.min(across, down) > 9 ? 3 : 0;
    const edges = (count, step, from) => Array.from({ length: count + 1 }, (_, at) => snapped(from + at * step));
    this.columns = edges(this.experts, across, LABELS);
    this.rows = edges(this.layers, down, 0);
    this.label(down);
    this.looks.fill(NOT_DRAWN);
    this.paint();
  }

  // Draw the cells that look otherwise than drawn.
  paint() {
    if (!this.pen) return;
    const boxes = Array.from({ length: MISSED + 1 }, () => []);
    const outlined = [];
    for (let key = 0; key < this.looks.length; key += 1) {
      const look = this.lookOf(key);
      if (look === this.looks[key]) continue;
      this.looks[key] = look;
      const box = this.boxOf(key);
      boxes[look & ~PREDICTED].push(box);
      if (look & PREDICTED) outlined.push(box);
      this.pen.clearRect(...this.placeOf(key));
    }
    boxes.forEach((some, shade) => {
      if (some.length) for (const paint of PAINTS[shade]) this.fill(paint, some);
    });
    if (outlined.length) this.outline(outlined);
  }

  lookOf(key) {
    const outlined = this.predicted[key] ? PREDICTED : 0;
    if (this.used[key]) return (this.used[key] === 1 ? HIT : MISSED) | outlined;
    if (!this.resident[key]) return ABSENT | outlined;
    return (RESIDENT + Math.round(LEVELS * this.heat[key])) | outlined;
  }

  // The cell with the gap after it, on whole pixels, so that no neighbour is touched.
  placeOf(key) {
    const [column, row] = [key % this.experts, Math.floor(key / this.experts)];
    const [x, y] = [this.columns[column], this.rows[row]];
    return [x, y, this.columns[column + 1] - x, this.rows[row + 1] - y];
  }

  boxOf(key) {
    const [x, y, width, height] = this.placeOf(key);
    return [x, y, width - this.gap, height - this.gap, this.round];
  }

  // One path a colour where cells are small and many. Round ones have a path each: the edges of a
  // path depend a little on all that is in it, and a cell is to look the same whenever it is drawn.
  fill([name, alpha], boxes) {
    const { pen } = this;
    pen.globalAlpha = alpha;
    pen.fillStyle = colour(name);
    for (const group of this.round ? boxes.map((box) => [box]) : [boxes]) {
      pen.beginPath();
      for (const box of group) {
        if (this.round) pen.roundRect(...box);
        else pen.rect(...box.slice(0, 4));
      }
      pen.fill();
    }
    pen.globalAlpha = 1;
  }

  outline(boxes) {
    const { pen } = this;
    const line = Math.max(1, Math.min(2, (this.columns[1] - this.columns[0] - this.gap) / 6));
    pen.strokeStyle = colour("predicted");
    pen.lineWidth = line;
    for (const [x, y, w, h, round] of boxes) {
      pen.beginPath();
      pen.roundRect(x + line / 2, y + line / 2, w - line, h - line, Math.max(0, round - 1));
      pen.stroke();
    }
  }

  label(down) {
    const { pen } = this;
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

// The flags of a bitmap in base64, the lowest bit of each byte first; null has none.
function bits(packed) {
  const bytes = atob(packed ?? "");
  return (key) => (bytes.charCodeAt(key >> 3) >> (key & 7)) & 1;
}
