// The recording in the page: its packed numbers, and what each step was.

const ARRAYS = { 8: Uint8Array, 16: Uint16Array, 32: Uint32Array };

// Numbers out of base64 of little-endian integers.
export function numbers({ bits, data }) {
  const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const size = bits / 8;
  const read = { 8: "getUint8", 16: "getUint16", 32: "getUint32" }[bits];
  return ARRAYS[bits].from({ length: bytes.length / size }, (_, at) => view[read](at * size, true));
}

export class Recording {
  constructor(data) {
    Object.assign(this, data);
    this.tokenIds = numbers(data.token_ids);
    this.firsts = sums(numbers(data.lengths)); // the first token of each step, and the end
    this.steps = this.firsts.length - 1;
    this.routes = numbers(data.routes);
    this.guesses = data.predicted && numbers(data.predicted);
    this.counts = Array.from({ length: this.steps }, (_, step) => this.usedIn(step).size);
    this.runs = data.caches.map((cache) => new Run(cache, this.counts, this.layers * this.experts));
  }

  // The keys that a step used.
  usedIn(step) {
    const keys = new Set();
    const width = this.layers * this.top_k;
    for (let at = this.firsts[step] * width; at < this.firsts[step + 1] * width; at += 1) {
      const layer = Math.floor((at % width) / this.top_k);
      if (this.routes[at] < this.experts) keys.add(layer * this.experts + this.routes[at]);
    }
    return keys;
  }

  // The keys that were predicted for a step; none without a predictor.
  predictedIn(step) {
    const width = this.layers * this.top_k;
    const guesses = this.guesses?.subarray(step * width, (step + 1) * width) ?? [];
    return new Set(Array.from(guesses, (expert, at) => Math.floor(at / this.top_k) * this.experts + expert));
  }

  // The share of the used experts that was predicted: recall@K for a step of one token.
  recallIn(step) {
    const predicted = this.predictedIn(step);
    const found = [...this.usedIn(step)].filter((key) => predicted.has(key)).length;
    return found / this.counts[step];
  }

  tokensIn(step) {
    return this.firsts[step + 1] - this.firsts[step];
  }

  stepOf(token) {
    return this.firsts.findIndex((first) => first > token) - 1;
  }
}

// One cache: what it missed in each step, and what lay in its slots before it (1 by key).
class Run {
  constructor({ policy, slots, missed, left }, counts, keys) {
    Object.assign(this, { policy, slots });
    this.missed = lists(missed);
    this.left = lists(left);
    this.residents = [];
    let held = new Uint8Array(keys);
    this.missed.forEach((loaded, step) => {
      this.residents.push(held);
      held = held.slice();
      for (const key of loaded) held[key] = 1;
      for (const key of this.left[step]) held[key] = 0;
    });
    this.requests = sums(counts);
    this.loads = sums(this.missed.map((loaded) => loaded.length));
  }

  // Hit rate of the steps from one up to another; all of it where nothing was asked for.
  rate(from, to) {
    const asked = this.requests[to] - this.requests[from];
    return asked ? 1 - (this.loads[to] - this.loads[from]) / asked : 1;
  }
}

function lists({ counts, keys }) {
  const all = numbers(keys);
  const ends = sums(numbers(counts));
  return Array.from({ length: ends.length - 1 }, (_, step) => all.subarray(ends[step], ends[step + 1]));
}

// 0, and the sums of the first one, two, ... numbers.
function sums(given) {
  const all = [0];
  for (const one of given) all.push(all.at(-1) + one);
  return all;
}
