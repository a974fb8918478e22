/** Projects, and the limits of all their keys together. */
import { ask, get } from "../lib/api.js";
import { compact } from "../lib/format.js";
import { html, useState } from "../lib/html.js";
import { useAction, useResource } from "../lib/resource.js";
import { Fault, Form } from "../parts/basics.js";
import { LIMITS, LimitFields } from "../parts/limits.js";

/** @param {{keys: Key[]}} props `keys`: reload the projects when they change, since a new key may create a project */
export function Projects({ keys }) {
  const projects = useResource(
    async (signal) => /** @type {Project[]} */ ((await get("/projects", signal)).projects),
    [keys.length],
  );
  return html`<section class="card" aria-label="Projects">
    <h2>Projects</h2>
    <${Fault} problem=${projects.problem} />
    ${
      projects.data?.length
        ? projects.data.map(
            (project) =>
              html`<${ProjectLimits} key=${project.name} project=${project} onChange=${projects.reload} />`,
          )
        : html`<p>A project begins with its first key.</p>`
    }
  </section>`;
}

/** @param {{project: Project, onChange: () => Promise<void>}} props */
function ProjectLimits({ project, onChange }) {
  const [limits, setLimits] = useState(
    /** @type {Partial<Limits>} */ (Object.fromEntries(LIMITS.map(([name]) => [name, project[name]]))),
  );
  const save = useAction(async () => {
    await ask("PATCH", `/projects/${encodeURIComponent(project.name)}`, { json: limits });
    await onChange();
  });
  const shown = LIMITS.flatMap(([name, words]) =>
    project[name] === null ? [] : [`${words.toLowerCase()}: ${compact(project[name] ?? 0)}`],
  );
  return html`<details>
    <summary><strong>${project.name}</strong> <small>${shown.join(", ") || "no limits"}</small></summary>
    <${Form} label="Limits of ${project.name}" onSubmit=${save.run}>
      <${LimitFields} limits=${limits} problem=${save.problem} onChange=${setLimits} />
      <${Fault} problem=${save.problem} beside=${LIMITS.map(([name]) => name)} />
      <button type="submit" disabled=${save.busy}>Save</button>
    <//>
  </details>`;
}
