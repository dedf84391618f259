// The sampling settings as fields of a request.

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];

export function samplingOf(find) {
  const given = {};
  for (const name of NUMBERS) {
    const value = find(name).valueAsNumber;
    if (Number.isFinite(value)) given[name] = value;
  }
  return given;
}
