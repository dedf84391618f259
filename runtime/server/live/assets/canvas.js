// Canvases that are sharp, in the colours of the style sheet.

// A blank context that draws in CSS pixels.
export function fitted(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  const [across, down] = [Math.round(width * scale), Math.round(height * scale)];
  const pen = canvas.getContext("2d");
  if (canvas.width !== across || canvas.height !== down) {
    canvas.width = across;
    canvas.height = down;
    canvas.style.height = `${height}px`;
  }
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  return pen;
}

// Keep owner.width, that of the space around a canvas, and draw anew where it changes.
export function followWidth(owner, canvas) {
  owner.width = canvas.parentElement.clientWidth;
  new ResizeObserver(([{ contentRect }]) => {
    const width = Math.round(contentRect.width);
    if (width === owner.width) return;
    owner.width = width;
    owner.draw();
  }).observe(canvas.parentElement);
}

// The nearest edge between two pixels of the screen, in CSS pixels.
export function snapped(value) {
  const scale = window.devicePixelRatio || 1;
  return Math.round(value * scale) / scale;
}

let known = {};

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { known = {}; });

// A colour by its name in the style sheet.
export function colour(name) {
  known[name] ??= getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  return known[name];
}
