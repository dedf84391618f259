// The pace of drawing: within frames of the browser, and so seldom that it takes little of the machine.

const SOONEST = 200; // ms between two drawings, where there is time to spare
const LATEST = 1000;
const SHARE = 0.01; // of the time of one core that drawing may take
const KEPT = 5; // drawings, of which the one of median time counts: others are interrupted

export class Pace {
  constructor() {
    this.parts = new Set();
    this.due = 0;
    this.took = []; // ms of the last drawings
    this.isAsked = false;
  }

  // Have draw() called in one of the next frames, once however often it is asked for.
  ask(draw) {
    this.parts.add(draw);
    if (this.isAsked) return;
    this.isAsked = true;
    setTimeout(() => requestAnimationFrame(() => this.run()), Math.max(0, this.due - performance.now()));
  }

  run() {
    const began = performance.now();
    const parts = [...this.parts];
    this.parts.clear();
    this.isAsked = false;
    this.due = began + this.rest();
    for (const draw of parts) draw();
    setTimeout(() => { // after layout and paint of this frame, which count too
      this.took = [performance.now() - began, ...this.took].slice(0, KEPT);
      this.due = began + this.rest();
    });
  }

  // Milliseconds from one drawing to the next.
  rest() {
    const took = [...this.took].sort((a, b) => a - b)[this.took.length >> 1] ?? 0;
    return Math.min(LATEST, Math.max(SOONEST, took / SHARE));
  }
}
