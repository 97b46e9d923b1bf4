// Boxes and points in a model's answer, in the notations of the model families.
//
// Tokens that stand for places are in a text only if the request has `skip_special_tokens: false`.

/**
 * A box or a point that a model has written. `numbers`: left, top, right and bottom of a box, or x
 * and y of a point. `scale`: the range of the numbers, if the notation tells: 1000 for thousandths.
 */
export interface Place {
  numbers: number[];
  label?: string;
  scale?: number;
}

type Read = (match: RegExpMatchArray) => Place[];

/** Of a text; later places are left out. */
const MOST_PLACES = 10_000;
// How far from a place its label may be, in characters.
const NEAR = 500;
const NUMBER = String.raw`-?\d+(?:\.\d+)?`;
const FOUR = Array<string>(4).fill(String.raw`\s*${NUMBER}\s*`).join(",");
const TWO = Array<string>(2).fill(String.raw`\s*${NUMBER}\s*`).join(",");
const PAIR = String.raw`\(${TWO}\)`;
const LABEL = `(?<label>[^<]{0,${NEAR}})`;
const BODY = String.raw`(?<places>[-\d\s.,()\[\]]+)`;
const KEYED_LABEL = /"(?:label|name|text_content)"\s*:\s*"([^"]*)"/;

/** The boxes and points in `text`, in its order. */
export function findPlaces(text: string): Place[] {
  const found: [number, Place][] = [];
  let left = text;
  for (const [notation, read] of NOTATIONS) {
    for (const match of left.matchAll(notation)) {
      for (const place of read(match)) found.push([match.index, place]);
      if (found.length > MOST_PLACES) break;
    }
    // What one notation explains is not read again by the next.
    left = left.replace(notation, (whole) => " ".repeat(whole.length));
  }
  found.sort(([one], [other]) => one - other);
  return found.slice(0, MOST_PLACES).map(([, place]) => place);
}

function place(numbers: number[], label?: string, scale?: number): Place {
  const named = label?.trim();
  return { numbers, ...(named ? { label: named } : {}), ...(scale ? { scale } : {}) };
}

/** Numbers in fours are boxes; two are a point. */
function grouped(written: string, label?: string, scale?: number): Place[] {
  const numbers = Array.from(written.matchAll(new RegExp(NUMBER, "g")), ([each]) => Number(each));
  const size = numbers.length === 2 ? 2 : 4;
  return Array.from({ length: Math.floor(numbers.length / size) }, (_, index) =>
    place(numbers.slice(index * size, (index + 1) * size), label, scale),
  );
}

/** Numbers between tags, behind a label between tags. */
const tagged =
  (scale: number): Read =>
  ({ groups }) =>
    grouped(groups!.places!, groups!.label, scale);

/** Kosmos-2: two cells, in a grid of 32 by 32. */
function patches({ groups }: RegExpMatchArray): Place[] {
  const cells = Array.from(groups!.places!.matchAll(/\d+/g), ([each]) => Number(each));
  return Array.from({ length: Math.floor(cells.length / 2) }, (_, index) => {
    const [first, last] = [cells[2 * index]!, cells[2 * index + 1]!];
    const [left, top, right, bottom] = [first % 32, first >> 5, last % 32, last >> 5];
    const isThin = left === right || top === bottom;
    // Else from the middle of the one to that of the other.
    const corners = isThin
      ? [left, top, right + 1, bottom + 1]
      : [left + 0.5, top + 0.5, right + 0.5, bottom + 0.5];
    return place(corners, groups!.label, 32);
  });
}

/** Molmo: `<point x="10.5" y="20" alt="a">`, `<points x1="1" y1="2" x2="3" y2="4">`, in
 * hundredths. */
function points({ groups }: RegExpMatchArray): Place[] {
  const given = Array.from(
    groups!.fields!.matchAll(/\b([xy]\d*|alt)="([^"]*)"/g),
    ([, name, value]) => [name!, value!] as const,
  );
  const fields = new Map(given);
  const label = groups!.label?.trim() || fields.get("alt");
  const isNumber = new RegExp(`^${NUMBER}$`);
  return [...fields].flatMap(([name, x]) => {
    const y = fields.get(`y${name.slice(1)}`) ?? "";
    if (!name.startsWith("x") || !isNumber.test(x) || !isNumber.test(y)) return [];
    return [place([Number(x), Number(y)], label, 100)];
  });
}

/** PaliGemma: top, left, bottom, right, in 1024ths, before their label. */
function placesBefore({ groups }: RegExpMatchArray): Place[] {
  const numbers = Array.from(groups!.places!.matchAll(/\d{4}/g), ([each]) => Number(each));
  const [top, left, bottom, right] = numbers as [number, number, number, number];
  return [place([left, top, right, bottom], groups!.label, 1024)];
}

/** Florence-2: the numbers of thousandths, whose middles are meant, behind their label. */
function placesBehind({ 0: whole, index, input }: RegExpMatchArray): Place[] {
  const before = input!.slice(Math.max(0, index! - NEAR), index);
  const label = before.split(/[<>\n;]/).at(-1);
  return grouped(whole, label, 1000).map((found) => ({
    ...found,
    numbers: found.numbers.map((number) => number + 0.5),
  }));
}

/** JSON. Gemini's and Gemma's `box_2d` is top, left, bottom, right, in thousandths. */
function keyed(match: RegExpMatchArray): Place[] {
  const label = labelAround(match);
  return grouped(match.groups!.places!, label).map((found) => {
    if (match.groups!.key !== "box_2d" || found.numbers.length !== 4) return found;
    const [top, left, bottom, right] = found.numbers as [number, number, number, number];
    return place([left, top, right, bottom], label, 1000);
  });
}

/** The label in the JSON object with the match. */
function labelAround({ 0: whole, index, input }: RegExpMatchArray): string | undefined {
  const [begin, end] = [index!, index! + whole.length];
  const before = input!.slice(Math.max(0, begin - NEAR), begin).lastIndexOf("{");
  const after = input!.slice(end, end + NEAR).indexOf("}");
  if (before < 0 || after < 0) return undefined;
  return KEYED_LABEL.exec(input!.slice(Math.max(0, begin - NEAR) + before, end + after))?.[1];
}

const bare: Read = (match) => grouped(match[0], labelAround(match));

const global = (...parts: string[]) => new RegExp(parts.join(""), "g");

const NOTATIONS: [RegExp, Read][] = [
  // DeepSeek-VL2
  [
    global(
      String.raw`(?:<\|ref\|>${LABEL}<\|/ref\|>\s*)?`,
      String.raw`<\|det\|>${BODY}<\|/det\|>`,
    ),
    tagged(999),
  ],
  // InternVL, MiniCPM-V
  [global(String.raw`(?:<ref>${LABEL}</ref>\s*)?<box>${BODY}</box>`), tagged(1000)],
  // Qwen2-VL
  [
    global(
      String.raw`(?:<\|object_ref_start\|>${LABEL}<\|object_ref_end\|>\s*)?`,
      String.raw`<\|box_start\|>${BODY}<\|box_end\|>`,
    ),
    tagged(1000),
  ],
  // GLM-4.1V and later
  [global(String.raw`<\|begin_of_box\|>(?=[\s\[])${BODY}<\|end_of_box\|>`), tagged(1000)],
  // Kosmos-2
  [
    global(
      String.raw`(?:<phrase>${LABEL}</phrase>)?<object>`,
      String.raw`(?<places>(?:<patch_index_\d{4}>|</delimiter_of_multi_objects/>)+)</object>`,
    ),
    patches,
  ],
  // Molmo
  [global(String.raw`<points?\s(?<fields>[^<>]+)>(?:${LABEL}</points?>)?`), points],
  // PaliGemma
  [/(?<places>(?:<loc\d{4}>){4})(?<label>[^<;\n]{0,200})/g, placesBefore],
  // Florence-2
  [/(?:<loc_\d{1,3}>){2,}/g, placesBehind],
  // JSON: Qwen2.5-VL and later, GLM-4.5V, Gemma 3
  [
    global(
      String.raw`"(?<key>bbox_2d|bbox|box_2d|box|point_2d|point)"\s*:\s*`,
      String.raw`(?<places>\[(?:${FOUR}|${TWO})\])`,
    ),
    keyed,
  ],
  // Any: [left, top, right, bottom], or (left, top),(right, bottom)
  [global(String.raw`\[${FOUR}\]|${PAIR}\s*(?:,\s*)?${PAIR}`), bare],
];
