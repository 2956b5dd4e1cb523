// SPDX-License-Identifier: GPL-3.0-or-later
/** Requests to the server's routes under /gag/ and to ComfyUI's own. */
import { api } from "../../scripts/api.js";
import { isObject, isString } from "./messages.js";

const WAIT_MS = 250;
const TOKEN_MS = 2000;
/** Token that the server sent over this tab's connection, and that requests repeat as proof that they come from it. */
let token = "";
/** @type {Promise<void> | undefined} the request for a token that goes on */
let askingForToken;

export const connected = () => api.socket?.readyState === WebSocket.OPEN && Boolean(api.clientId);

/** Wait a moment. */
export const pause = () => new Promise((resolve) => setTimeout(resolve, WAIT_MS));

/**
 * Return the server's answer, from its JSON.
 * @param {string} route
 */
export async function ask(route) {
  const answer = await api.fetchApi(route);
  if (!answer.ok) throw new Error(`${route}: ${answer.status}`);
  return answer.json();
}

/**
 * Send the server something as JSON.
 * @param {string} route
 * @param {object} content
 */
function post(route, content) {
  const headers = { "Content-Type": "application/json" };
  return api.fetchApi(route, { method: "POST", headers, body: JSON.stringify({ client: api.clientId, ...content }) });
}

/** Ask the server for the token, if it is not there, and wait until it comes, but not for long. */
export const askForToken = () => (token ? Promise.resolve() : (askingForToken ??= waitForToken()));

async function waitForToken() {
  try {
    await post("/gag/token", {});
    for (let waited = 0; !token && waited < TOKEN_MS; waited += WAIT_MS) await pause();
  } catch {
    // The server is gone. The next request asks again.
  } finally {
    askingForToken = undefined;
  }
}

/**
 * Send the server a request that it takes from this tab alone, and return the answer; undefined if the tab has no token
 * yet, because its connection is so new that the server does not know it.
 * @param {string} route
 * @param {object} content
 */
export async function postWithToken(route, content) {
  await askForToken();
  return token ? post(route, { token, ...content }) : undefined;
}

api.addEventListener("gag.token", ({ detail }) => {
  if (isObject(detail) && isString(detail.token)) token = detail.token;
});

// A new connection has another token.
api.addEventListener("reconnected", () => {
  token = "";
});
