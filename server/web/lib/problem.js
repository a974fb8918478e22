/** Errors to show: the server's, and the page's own. */

/** An error answer of the server (RFC 9457). */
export class Problem extends Error {
  /**
   * @param {number} status 0 if there was no answer
   * @param {string} detail
   * @param {{loc: (string | number)[], message: string}[]} [errors] a field each
   * @param {number | null} [retryAfter] seconds
   */
  constructor(status, detail, errors = [], retryAfter = null) {
    super(detail);
    this.status = status;
    this.errors = errors;
    this.retryAfter = retryAfter;
  }

  /** What is wrong with one field, or "". @param {string} name */
  of(name) {
    return this.errors
      .filter((error) => error.loc.includes(name))
      .map((error) => error.message)
      .join("; ");
  }
}
