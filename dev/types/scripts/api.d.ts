// SPDX-License-Identifier: GPL-3.0-or-later
/** The part of ComfyUI's front end that web/ uses, declared for `tsc`. */
export const api: {
  clientId?: string;
  socket?: WebSocket | null;
  addEventListener(kind: string, listener: (event: CustomEvent) => void): void;
  fetchApi(route: string, options?: RequestInit): Promise<Response>;
  getCustomNodesI18n(): Promise<Record<string, Record<string, any>>>;
};
