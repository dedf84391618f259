// A chart of two lines: this cache, and LRU beside it.

import { colour, fitted, followWidth } from "./canvas.js";

const HEIGHT = 150;
const SPACE = { left: 54, right: 6, top: 8, bottom: 6 };
const MOST = 150;

export class Chart {
  // format: of the axis. most: the axis's end where it is fixed.
  constructor(canvas, { format, most }) {
    Object.assign(this, { canvas, format, most, room: MOST, cursor: null });
    followWidth(this, canvas);
    this.clear();
  }

  clear() {
    this.points = [];
    this.draw();
  }

  // One more point, which `draw` shows.
  add(own, lru) {
    if (!Number.isFinite(own) || !Number.isFinite(lru)) return;
    this.points.push([own, lru]);
    if (this.points.length > MOST) this.points.shift();
  }

  // A whole run of points, of which one is now; LRU's is null where there is no other cache.
  put(points, cursor) {
    Object.assign(this, { points, cursor, room: Math.max(points.length, 2) });
    this.draw();
  }

  tell([own, lru]) {
    const other = lru === null ? "" : `, LRU ${this.format(lru)}`;
    this.canvas.ariaLabel = `${this.canvas.dataset.title}: ${this.format(own)}${other}`;
  }

  draw() {
    const told = this.points.at(this.cursor ?? -1);
    if (told) this.tell(told);
    const { width } = this;
    if (!width) return;
    const pen = fitted(this.canvas, width, HEIGHT);
    const end = this.most ?? niceAbove(Math.max(0, ...this.points.flat()));
    const at = (value) => SPACE.top + (HEIGHT - SPACE.top - SPACE.bottom) * (1 - value / end);
    this.axis(pen, width, end, at);
    this.line(pen, colour("lru"), width, at, 1, [5, 4]);
    this.line(pen, colour("hit"), width, at, 0, []);
    if (this.cursor !== null) this.mark(pen, width);
  }

  // Where a point lies across.
  across(index, width) {
    return SPACE.left + (index * (width - SPACE.left - SPACE.right)) / (this.room - 1);
  }

  mark(pen, width) {
    const x = Math.round(this.across(this.cursor, width)) + 0.5;
    pen.strokeStyle = colour("ink");
    pen.beginPath();
    pen.moveTo(x, SPACE.top);
    pen.lineTo(x, HEIGHT - SPACE.bottom);
    pen.stroke();
  }

  axis(pen, width, end, at) {
    pen.font = "11px system-ui, sans-serif";
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    pen.strokeStyle = colour("grid");
    pen.fillStyle = colour("dim");
    for (const value of [0, end / 2, end]) {
      pen.beginPath();
      pen.moveTo(SPACE.left, Math.round(at(value)) + 0.5);
      pen.lineTo(width - SPACE.right, Math.round(at(value)) + 0.5);
      pen.stroke();
      pen.fillText(this.format(value), SPACE.left - 6, at(value));
    }
  }

  line(pen, ink, width, at, column, dashes) {
    pen.strokeStyle = ink;
    pen.lineWidth = 2;
    pen.lineJoin = "round";
    pen.setLineDash(dashes);
    pen.beginPath();
    this.points.forEach((point, index) => {
      if (point[column] !== null) pen.lineTo(this.across(index, width), at(point[column]));
    });
    pen.stroke();
    pen.setLineDash([]);
    pen.lineWidth = 1;
  }
}

// 1, 2 or 5 times a power of two kilobytes or so: an even end of the axis.
function niceAbove(value) {
  if (!(value > 0)) return 1;
  const unit = 2 ** (10 * Math.floor(Math.log2(value) / 10));
  const steps = [1, 2, 4, 6, 8, 10, 16, 20, 40, 60, 80, 100, 160, 200, 400, 600, 800, 1024];
  return unit * steps.find((step) => step * unit >= value);
}
