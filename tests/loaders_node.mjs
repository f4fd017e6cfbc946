// node loaders_node.mjs LIBRARY < {cases, count}: prints what `generate` returns, as JSON.

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
import { generate } from "./loaders_generate.mjs";

const library = await import(pathToFileURL(process.argv[2]));
const { cases, count, hub, cache } = JSON.parse(readFileSync(0, "utf8"));
if (hub) library.env.remoteHost = hub;
library.env.allowRemoteModels = Boolean(hub);
library.env.allowLocalModels = !hub;
library.env.useFSCache = Boolean(hub); // it hands the library files, which has no others in Node
library.env.cacheDir = cache;
console.log(JSON.stringify(await generate(library, cases, count, {})));
