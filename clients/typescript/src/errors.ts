// What the server refuses is an `APIError` of the `openai` package, with `status`, `code`, `param`
// and `requestID`; these are the errors of the client itself.
import { OpenAIError } from "openai";

/** Base of the errors that this package adds to those of `openai`. */
export class SaccadeError extends OpenAIError {
  override name = this.constructor.name;
}

/** A file or a picture that cannot be read or sent. */
export class UnusableMedia extends SaccadeError {}

/** The answer is not in the form of the API, or is cut off. */
export class UnexpectedAnswer extends SaccadeError {}

/** `status` and `code` of an error of any copy of the `openai` package. */
export function refusal(error: unknown): { status?: number; code?: string | null } {
  return error instanceof Error ? (error as { status?: number; code?: string | null }) : {};
}
