// Numbers as people read them.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(count) {
  let unit = 0;
  while (Math.abs(count) >= 1024 && unit < UNITS.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${count.toFixed(unit && count < 100 ? 1 : 0)} ${UNITS[unit]}`;
}

export function percent(share) {
  return Number.isFinite(share) ? `${(100 * share).toFixed(1)} %` : "–";
}

export function speed(rate) {
  return Number.isFinite(rate) ? rate.toFixed(rate < 10 ? 2 : 1) : "–";
}

export function whole(count) {
  return Math.round(count).toLocaleString("en");
}
