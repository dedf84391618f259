// A chart of two lines: this cache, and LRU's shadow.

import { colour, fitted } from "./canvas.js";

const HEIGHT = 150;
const SPACE = { left: 54, right: 6, top: 8, bottom: 6 };
const MOST = 150;

export class Chart {
  // format: of the axis. most: the axis's end where it is fixed.
  constructor(canvas, { format, most }) {
    Object.assign(this, { canvas, format, most });
    this.clear();
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
  }

  clear() {
    this.points = [];
    this.draw();
  }

  add(own, lru) {
    if (!Number.isFinite(own) || !Number.isFinite(lru)) return;
    this.points.push([own, lru]);
    if (this.points.length > MOST) this.points.shift();
    const [mine, other] = [this.format(own), this.format(lru)];
    this.canvas.ariaLabel = `${this.canvas.dataset.title}: ${mine}, LRU ${other}`;
    this.draw();
  }

  draw() {
    const width = this.canvas.parentElement.clientWidth;
    if (!width) return;
    const pen = fitted(this.canvas, width, HEIGHT);
    const end = this.most ?? niceAbove(Math.max(0, ...this.points.flat()));
    const at = (value) => SPACE.top + (HEIGHT - SPACE.top - SPACE.bottom) * (1 - value / end);
    this.axis(pen, width, end, at);
    this.line(pen, colour("lru"), width, at, 1, [5, 4]);
    this.line(pen, colour("hit"), width, at, 0, []);
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
    const step = (width - SPACE.left - SPACE.right) / (MOST - 1);
    pen.strokeStyle = ink;
    pen.lineWidth = 2;
    pen.lineJoin = "round";
    pen.setLineDash(dashes);
    pen.beginPath();
    this.points.forEach((point, index) => {
      pen.lineTo(SPACE.left + index * step, at(point[column]));
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
