// The size at which the model sees a picture, as the server tells.
import type { ImageCost } from "./answers.js";
import type { Size } from "./format.js";
import type { Detail } from "./media.js";
import { Remembered } from "./remembered.js";

/** Size and options of a picture. */
export interface Asked {
  size: Size;
  detail: Detail | undefined;
  max_tokens: number | undefined;
}

/** Asks the server what pictures cost under a budget; undefined if it does not tell. */
export type AskCosts = (
  pictures: readonly Asked[],
  budget: number | undefined,
  signal: AbortSignal | undefined,
) => Promise<ImageCost[] | undefined>;

type Target = Size | undefined;

interface Group {
  pictures: readonly Asked[];
  key: string;
}

/** Resizing must take away at least a fifth of the pixels, or it only loses quality. */
const MAX_KEPT = 0.8;
const REMEMBERED = 10_000;

export class Targets {
  // By the sizes and options of pictures that were asked about together.
  readonly #found = new Remembered<readonly Target[]>(REMEMBERED);
  readonly #ask: AskCosts;

  constructor(ask: AskCosts) {
    this.#ask = ask;
  }

  /**
   * The size at which the model sees each picture, if that is much smaller and costs the same.
   * Pictures that share a budget keep their sizes unless all of them cost the same.
   */
  async of(
    pictures: readonly Asked[],
    budget: number | undefined,
    signal: AbortSignal | undefined,
  ): Promise<readonly Target[]> {
    const together = budget === undefined ? pictures.map((each) => [each]) : [pictures];
    const groups = together.map((group) => ({
      pictures: group,
      key: JSON.stringify([group, budget]),
    }));
    const unknown = groups.filter(({ key }) => !this.#found.has(key));
    const answers = new Map(groups.map(({ key }) => [key, this.#found.get(key)]));
    if (unknown.length > 0)
      for (const [key, targets] of await this.#asked(unknown, budget, signal)) {
        this.#found.set(key, targets);
        answers.set(key, targets);
      }
    return groups.flatMap(({ pictures, key }) => answers.get(key) ?? pictures.map(() => undefined));
  }

  async #asked(
    groups: readonly Group[],
    budget: number | undefined,
    signal: AbortSignal | undefined,
  ): Promise<Map<string, readonly Target[]>> {
    const flat = groups.flatMap(({ pictures }) => pictures);
    const costs = await this.#ask(flat, budget, signal);
    if (costs === undefined) return new Map();
    const wanted = costs.map(targetOf);
    const smaller = flat.map((each, index) => ({ ...each, size: wanted[index] ?? each.size }));
    const again = await this.#ask(smaller, budget, signal);
    if (again === undefined) return new Map();
    const isSame = wanted.map((target, index) => {
      if (target === undefined) return true;
      const processed = wholeAt(again[index]!);
      const isKept = processed?.[0] === target[0] && processed[1] === target[1];
      return isKept && again[index]!.tokens === costs[index]!.tokens;
    });
    const found = new Map<string, readonly Target[]>();
    let start = 0;
    for (const { pictures, key } of groups) {
      const end = start + pictures.length;
      const isKept = isSame.slice(start, end).every(Boolean);
      found.set(key, isKept ? wanted.slice(start, end) : pictures.map(() => undefined));
      start = end;
    }
    return found;
  }
}

function targetOf(cost: ImageCost): Target {
  const whole = wholeAt(cost);
  const isSmall = whole && whole[0] * whole[1] <= MAX_KEPT * cost.width * cost.height;
  return isSmall ? whole : undefined;
}

/** The processed size; undefined if the model sees only a part of the picture, or nobody knows. */
function wholeAt({ width, height, region, ...cost }: ImageCost): Target {
  const isWhole = String(region) === String([0, 0, width, height]);
  if (!isWhole || cost.processed_width === null || cost.processed_height === null) return undefined;
  return [cost.processed_width, cost.processed_height];
}
