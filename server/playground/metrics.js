// Reads `/metrics`, and what changed between two reads.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** The samples of a page in Prometheus' text format, by name: `[{labels, value}]`. */
export function parse(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : LINE.exec(line);
    if (!match) continue;
    const [, name, labels, value] = match;
    if (!samples.has(name)) samples.set(name, []);
    samples.get(name).push({
      labels: Object.fromEntries(
        [...(labels ?? "").matchAll(LABEL)].map(([, key, val]) => [key, val]),
      ),
      value: Number(value),
    });
  }
  return samples;
}

const fits = (labels, wanted) =>
  Object.entries(wanted).every(([key, value]) => labels[key] === value);

/** The sum of a metric over all series with these labels. */
export function total(samples, name, labels = {}) {
  return (samples.get(name) ?? []).reduce(
    (sum, each) => (fits(each.labels, labels) ? sum + each.value : sum),
    0,
  );
}

/** The sums of a metric by one label: a map. */
export function by(samples, name, label) {
  const sums = new Map();
  for (const { labels, value } of samples.get(name) ?? [])
    sums.set(labels[label], (sums.get(labels[label]) ?? 0) + value);
  return sums;
}

/** A quantile of what a histogram has counted between two reads, as Prometheus estimates it. */
export function quantile(before, after, name, share) {
  const old = by(before, `${name}_bucket`, "le");
  const buckets = [...by(after, `${name}_bucket`, "le")]
    .map(([le, count]) => [le === "+Inf" ? Infinity : Number(le), count - (old.get(le) ?? 0)])
    .sort(([a], [b]) => a - b);
  const all = buckets.at(-1)?.[1] ?? 0;
  if (!all) return null;
  let lower = 0;
  let below = 0;
  for (const [le, count] of buckets) {
    if (count >= share * all)
      return le === Infinity
        ? lower
        : lower + ((le - lower) * (share * all - below)) / Math.max(count - below, 1);
    lower = le;
    below = count;
  }
  return lower;
}
