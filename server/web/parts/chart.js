/** Curves over one axis, by uPlot, which is loaded when the first is drawn. */
import { html, useEffect, useRef } from "../lib/html.js";

/**
 * @typedef {{label: string, tone: "first" | "second" | "third", values: (number | null)[]}} Series
 */

/** @type {Promise<typeof import("../vendor/uplot.mjs")> | null} */
let library = null;

/** Distances between whole numbers on an axis. */
const WHOLE = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 50_000, 100_000];

/** @param {string} name of a colour of the style sheet */
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/**
 * A table has the same for who can't see it.
 * @param {{title: string, x: number[], xLabel: string, isTime?: boolean, series: Series[], height?: number}} props
 */
export function Chart({ title, x, xLabel, isTime = false, series, height = 220 }) {
  const place = useRef(/** @type {HTMLDivElement | null} */ (null));
  const plot = useRef(/** @type {InstanceType<typeof import("../vendor/uplot.mjs").default> | null} */ (null));
  const shape = series.map((one) => one.label).join("|");

  useEffect(() => {
    let gone = false;
    const element = place.current;
    if (!element) return undefined;
    const fit = new ResizeObserver(() => plot.current?.setSize({ width: element.clientWidth, height }));
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const draw = async () => {
      library ??= import("../vendor/uplot.mjs");
      const { default: UPlot } = await library;
      if (gone) return;
      plot.current?.destroy();
      const rule = { stroke: colour("line"), width: 1 };
      const axis = { stroke: colour("muted"), grid: rule, ticks: rule };
      plot.current = new UPlot(
        {
          width: element.clientWidth || 300,
          height,
          scales: { x: { time: isTime } },
          axes: [{ ...axis, ...(isTime ? {} : { label: xLabel, labelSize: 22, incrs: WHOLE }) }, axis],
          series: [
            { label: xLabel },
            ...series.map((one) => ({
              label: one.label,
              stroke: colour(one.tone),
              width: 2,
              spanGaps: true,
              points: { show: one.values.filter((value) => value !== null).length < 24 },
            })),
          ],
        },
        [x, ...series.map((one) => one.values)],
        element,
      );
    };
    void draw();
    fit.observe(element);
    dark.addEventListener("change", draw);
    return () => {
      gone = true;
      fit.disconnect();
      dark.removeEventListener("change", draw);
      plot.current?.destroy();
      plot.current = null;
    };
  }, [shape, height, isTime, xLabel]);

  useEffect(() => {
    plot.current?.setData([x, ...series.map((one) => one.values)]);
  }, [x, series]);

  return html`<figure class="chart">
    <figcaption>${title}</figcaption>
    <div ref=${place} aria-hidden="true"></div>
    ${
      isTime
        ? null
        : html`<details>
          <summary>As a table</summary>
          <div class="scroll" tabindex="0" role="region" aria-label="${title}, as a table">
            <table>
              <thead>
                <tr>
                  <th scope="col">${xLabel}</th>
                  ${series.map((one) => html`<th scope="col">${one.label}</th>`)}
                </tr>
              </thead>
              <tbody>
                ${x.map(
                  (at, row) =>
                    html`<tr>
                      <th scope="row">${at}</th>
                      ${series.map((one) => html`<td>${one.values[row]?.toPrecision(4) ?? ""}</td>`)}
                    </tr>`,
                )}
              </tbody>
            </table>
          </div>
        </details>`
    }
  </figure>`;
}
