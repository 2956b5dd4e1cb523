// SPDX-License-Identifier: GPL-3.0-or-later
/** The part of ComfyUI's front end that web/ uses, declared for `tsc`. */
export const app: {
  canvas: any;
  graph: any;
  rootGraph?: any;
  extensionManager?: { setting?: { get(id: string): any } };
  registerExtension(extension: {
    name: string;
    setup?(): Promise<void> | void;
    nodeCreated?(node: any): void;
  }): void;
};
