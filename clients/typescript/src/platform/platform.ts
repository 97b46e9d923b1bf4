import type { Bytes } from "../bytes.js";
import type { Format, Size } from "../format.js";

/** What browsers and Node do each in their own way. */
export interface Platform {
  /** The bytes of a file. Throws UnusableMedia if it cannot be read. */
  read(path: string | URL): Promise<Bytes>;

  canResize(): Promise<boolean>;

  /**
   * The upright picture at the size `target`, as a JPEG of `quality` from 1 to 100 if it was lossy
   * and has no transparency, or else a PNG. Undefined if it is not what `format` says.
   */
  resized(data: Bytes, format: Format, target: Size, quality: number): Promise<Bytes | undefined>;
}
