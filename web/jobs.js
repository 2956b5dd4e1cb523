// SPDX-License-Identifier: GPL-3.0-or-later
/** Jobs in which ComfyUI reused the results of nodes, because nothing had changed. */
import { api } from "../../scripts/api.js";
import { isString } from "./messages.js";
import { ask, pause } from "./server.js";

const MOST_TRIES = 8;

/**
 * Watch the jobs of this tab. At the end of each, call `mark` with the workflow and the id of every node behind which
 * ComfyUI ran nothing.
 * @param {() => string[]} nodes returns the ids of the nodes that may be marked
 * @param {(workflow: unknown, id: string) => void} mark
 */
export function watchJobs(nodes, mark) {
  /** @type {unknown[]} nodes whose outputs were reused in the job that goes on */
  let reused = [];
  /** Nodes that said something in it: what is behind them has run. */
  const told = new Set();
  api.addEventListener("execution_start", () => {
    reused = [];
    told.clear();
  });
  api.addEventListener("execution_cached", ({ detail }) => {
    reused = Array.isArray(detail?.nodes) ? detail.nodes : [];
  });
  api.addEventListener("gag.status", ({ detail }) => {
    told.add(detail?.node);
  });
  api.addEventListener("execution_success", ({ detail }) => {
    const cached = new Set(reused.filter((id) => !told.has(id)));
    const candidates = nodes().filter((id) => cached.has(id));
    if (candidates.length && isString(detail?.prompt_id)) void markCached(detail.prompt_id, cached, candidates, mark);
  });
}

/**
 * @param {string} job
 * @param {Set<unknown>} cached
 * @param {string[]} candidates
 * @param {(workflow: unknown, id: string) => void} mark
 */
async function markCached(job, cached, candidates, mark) {
  try {
    let found;
    // The server keeps the job just after its last message.
    for (let tries = 0; !found && tries < MOST_TRIES; tries++) {
      await pause();
      found = (await ask(`/history/${encodeURIComponent(job)}`))[job];
    }
    // The job has the workflow that it was queued from; another one may be open by now.
    const [, , prompt, { extra_pnginfo: info }] = found.prompt;
    for (const id of candidates) {
      if (withReaders(id, prompt).every((node) => cached.has(node))) mark(info?.workflow?.id, id);
    }
  } catch {
    // The server has forgotten the job. The nodes keep saying what they said.
  }
}

/**
 * Return a node of a prompt and all nodes that get something from it, directly or through others.
 * @param {string} id
 * @param {Record<string, {inputs: Record<string, unknown>}>} prompt
 */
function withReaders(id, prompt) {
  const found = [id];
  for (const source of found) {
    for (const [reader, { inputs }] of Object.entries(prompt)) {
      if (found.includes(reader)) continue;
      if (Object.values(inputs).some((value) => Array.isArray(value) && value[0] === source)) found.push(reader);
    }
  }
  return found;
}
