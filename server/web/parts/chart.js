/** A chart of curves over one axis, which can be zoomed, and a table of the same values. */
import { html, useEffect, useRef, useState } from "../lib/html.js";
import { Table } from "./basics.js";
import { load, plotOf, show, zoomOut } from "./plot.js";

/** @import { Mark, Plot, Series } from "./plot.js" */

const [FIRST_SECONDS, MOST_SECONDS] = [3, 60];

/**
 * A table has the same values for screen readers.
 * @param {{title: string, x: number[], xLabel: string, yLabel?: string, isTime?: boolean, isLog?: boolean,
 *   isFromZero?: boolean, series: Series[], mark?: Mark | null, height?: number}} props
 */
export function Chart({
  title,
  x,
  xLabel,
  yLabel = "",
  isTime = false,
  isLog = false,
  isFromZero = false,
  series,
  mark = null,
  height = 220,
}) {
  const place = useRef(/** @type {HTMLDivElement | null} */ (null));
  const plot = useRef(/** @type {Plot | null} */ (null));
  const latest = useRef({ x, series, mark });
  const [isMissing, setMissing] = useState(false);
  const [zoom, setZoom] = useState(/** @type {[number, number] | null} */ (null));
  const shape = series.map((one) => `${one.label} ${one.tone}`).join("|");

  useEffect(() => {
    let gone = false;
    let wait = FIRST_SECONDS;
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    let timer;
    const element = place.current;
    if (!element) return undefined;
    const fit = new ResizeObserver(() => {
      plot.current?.setSize({ width: element.clientWidth, height });
      if (plot.current) show(plot.current, latest.current, isLog);
    });
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const again = () => {
      clearTimeout(timer);
      timer = setTimeout(() => (document.hidden ? again() : draw()), wait * 1000);
    };
    const draw = async () => {
      const found = await load();
      if (gone) return;
      setMissing(!found);
      if (!found) {
        again();
        wait = Math.min(2 * wait, MOST_SECONDS);
        return;
      }
      plot.current?.destroy();
      plot.current = plotOf({
        place: element,
        height,
        xLabel,
        yLabel,
        isTime,
        isLog,
        isFromZero,
        latest: () => latest.current,
        onZoom: (now) => setZoom((before) => (String(before) === String(now) ? before : now)),
        UPlot: found.default,
      });
    };
    void draw();
    fit.observe(element);
    dark.addEventListener("change", draw);
    return () => {
      gone = true;
      clearTimeout(timer);
      fit.disconnect();
      dark.removeEventListener("change", draw);
      plot.current?.destroy();
      plot.current = null;
    };
  }, [shape, height, isTime, isLog, isFromZero, xLabel, yLabel]);

  useEffect(() => {
    latest.current = { x, series, mark };
    if (plot.current) show(plot.current, latest.current, isLog);
  }, [x, series, mark]);
  const listed = series.filter((one) => !one.isDashed);

  return html`<figure class="chart">
    <figcaption>${title}</figcaption>
    ${isMissing ? html`<p class="muted">It can't be drawn just now. If that stays so, reload the page.</p>` : null}
    <div ref=${place} aria-hidden="true"></div>
    ${
      isTime
        ? null
        : html`<p class="zoom">
            ${
              zoom
                ? html`<small>${xLabel} ${Number(zoom[0].toPrecision(3))} to ${Number(zoom[1].toPrecision(3))}</small>
                    <button type="button" class="link" onClick=${() => plot.current && zoomOut(plot.current)}>Reset zoom</button>`
                : html`<small class="hint">Drag over the chart to zoom in.</small>`
            }
          </p>
          <details>
            <summary>As a table</summary>
            <${Table} label=${title} columns=${[xLabel, ...listed.map((one) => `#${one.label}`)]}>
              ${x.map(
                (at, row) =>
                  html`<tr key=${at}>
                    <th scope="row">${at}${at === mark?.at ? " (kept)" : ""}</th>
                    ${listed.map((one) => html`<td class="number">${one.values[row]?.toPrecision(4) ?? ""}</td>`)}
                  </tr>`,
              )}
            <//>
          </details>`
    }
  </figure>`;
}
