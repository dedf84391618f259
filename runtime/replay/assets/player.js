// The step that is shown: by slider, buttons and keys, or running on by itself.

const KEYS = { ArrowRight: 1, ArrowLeft: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
const OWN_KEYS = "input, select, textarea";

export class Player {
  // show(step): another step is to be seen.
  constructor(find, count, show) {
    Object.assign(this, { find, count, show });
    this.step = 0;
    this.timer = null;
    find("slider").max = count - 1;
    find("slider").addEventListener("input", () => this.go(find("slider").valueAsNumber));
    find("back").addEventListener("click", () => this.go(this.step - 1));
    find("on").addEventListener("click", () => this.go(this.step + 1));
    find("play").addEventListener("click", () => this.play(this.timer === null));
    find("pace").addEventListener("change", () => { if (this.timer !== null) this.play(true); });
    document.addEventListener("keydown", (event) => this.key(event));
  }

  go(step) {
    this.step = Math.max(0, Math.min(step, this.count - 1));
    this.find("slider").value = this.step;
    this.find("slider").setAttribute("aria-valuetext", `step ${this.step + 1} of ${this.count}`);
    this.find("place").textContent = `${this.step + 1} of ${this.count}`;
    this.show(this.step);
  }

  play(runs) {
    clearInterval(this.timer);
    this.timer = null;
    if (runs) {
      if (this.step === this.count - 1) this.go(0);
      this.timer = setInterval(() => this.next(), 1000 / Number(this.find("pace").value));
    }
    this.find("play").textContent = runs ? "Pause" : "Play";
  }

  next() {
    this.go(this.step + 1);
    if (this.step === this.count - 1) this.play(false);
  }

  // Keys of the page, where no control under the focus has them for itself.
  key(event) {
    const { target, key } = event;
    if (event.ctrlKey || event.metaKey || event.altKey || target.matches?.(OWN_KEYS)) return;
    if (key === " " && !target.matches?.("button")) this.play(this.timer === null);
    else if (key in KEYS) this.go(this.step + KEYS[key]);
    else return;
    event.preventDefault();
  }
}
