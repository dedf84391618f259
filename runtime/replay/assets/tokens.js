// The tokens as a text to click into. It stays text: nothing is ever parsed as HTML.

const QUARTERS = 3;

export class Tokens {
  // choose(token): somebody clicked it.
  constructor(place, recording, choose) {
    this.place = place;
    this.recording = recording;
    const { texts, tokenIds } = recording;
    this.spans = Array.from(tokenIds, (id, token) => {
      const span = document.createElement("span");
      span.className = texts ? "token" : "token id";
      span.textContent = texts ? shown(texts[token]) : String(id);
      span.title = `token ${token + 1}, id ${id}`;
      span.dataset.token = token;
      return span;
    });
    place.replaceChildren(...this.spans);
    place.addEventListener("click", (event) => {
      const token = event.target.dataset?.token;
      if (token !== undefined) choose(Number(token));
    });
    this.current = [];
  }

  // Underline each token by the quarters of its experts that a cache missed.
  tint(run) {
    const { firsts, counts } = this.recording;
    run.missed.forEach((missed, step) => {
      const quarters = Math.min(Math.floor((4 * missed.length) / Math.max(counts[step], 1)), QUARTERS);
      for (const span of this.spans.slice(firsts[step], firsts[step + 1])) span.dataset.misses = quarters;
    });
  }

  show(step) {
    for (const span of this.current) span.removeAttribute("aria-current");
    this.current = this.spans.slice(this.recording.firsts[step], this.recording.firsts[step + 1]);
    for (const span of this.current) span.setAttribute("aria-current", "true");
    this.follow(this.current[0]);
  }

  // Keep the token in view within the text, without moving the page.
  follow(span) {
    const top = span.offsetTop;
    const { scrollTop, clientHeight } = this.place;
    if (top < scrollTop || top + span.offsetHeight > scrollTop + clientHeight) {
      this.place.scrollTop = top - clientHeight / 3;
    }
  }
}

// Ends of lines can be seen; part of a character has no text of its own.
function shown(text) {
  return text === "" ? "·" : text.replaceAll("\n", "↵\n");
}
