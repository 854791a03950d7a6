"use strict";
// Chunks of data: scripts, since a page from file:// may not fetch anything. pack.py describes how they are stored.

/** Bytes of chunks that are kept for later. */
const KEPT_BYTES = 60e6;
/** Name -> the chunk, the one used last at the end. @type {Map<string, Promise<any>>} */
const chunks = new Map();
/** @type {Map<string, number>} */
const chunkBytes = new Map();
/** @type {Map<string, (text: string) => void>} */
const awaited = new Map();
/** @type {Record<string, any>} */
const ARRAYS = { float32: Float32Array, int32: Int32Array, uint32: Uint32Array, uint16: Uint16Array, uint8: Uint8Array };

/** Called by the scripts in data/. @param {string} name @param {string} text */
function loaded(name, text) {
  awaited.get(name)?.(text);
}

/**
 * A chunk by its name; types.d.ts says what it holds. It is loaded once, and again only if it was dropped to save memory.
 * @template T @param {string} name @returns {Promise<T>}
 */
function chunk(name) {
  const found = chunks.get(name) ?? readChunk(name);
  chunks.delete(name);
  chunks.set(name, found);
  return found;
}

/** @param {string} name @returns {Promise<any>} */
async function readChunk(name) {
  try {
    const stream = new Blob([bytesOf(await scriptText(name))]).stream().pipeThrough(new DecompressionStream("gzip"));
    const buffer = await new Response(stream).arrayBuffer();
    chunkBytes.set(name, buffer.byteLength);
    dropOldChunks();
    return unpacked(buffer);
  } catch (cause) {
    chunks.delete(name);
    throw new Error(`Cannot read data/${name}.js. Copy the whole folder again.`, { cause });
  }
}

/** @param {string} text in base64 */
function bytesOf(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const letters = atob(text);
  const bytes = new Uint8Array(letters.length);
  for (let place = 0; place < letters.length; place++) bytes[place] = letters.charCodeAt(place);
  return bytes;
}

/** @param {string} name @returns {Promise<string>} */
function scriptText(name) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    awaited.set(name, resolve);
    script.src = `data/${name}.js`;
    script.onload = script.onerror = () => {
      script.remove();
      awaited.delete(name);
      reject(new Error("The script did not load")); // nothing happens if it did
    };
    document.head.append(script);
  });
}

/** Drop the chunks that were not used for longest. Whoever holds one keeps it. */
function dropOldChunks() {
  let total = 0;
  for (const bytes of chunkBytes.values()) total += bytes;
  for (const name of [...chunks.keys()]) {
    if (total <= KEPT_BYTES) return;
    const bytes = chunkBytes.get(name);
    if (bytes === undefined) continue; // still being loaded
    total -= bytes;
    chunkBytes.delete(name);
    chunks.delete(name);
  }
}

/** @param {ArrayBuffer} buffer */
function unpacked(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = new TextDecoder().decode(new Uint8Array(buffer, 4, length));
  const start = 4 + Math.ceil(length / 4) * 4;
  return JSON.parse(header, (_, value) => {
    if (!value || !Array.isArray(value.$)) return value;
    const [dtype, offset, count, width] = value.$;
    const data = new ARRAYS[dtype](buffer, start + offset, count);
    return width === null ? data : matrix(data, width);
  });
}

/** @param {any} data @param {number} width @returns {Matrix<any>} */
function matrix(data, width) {
  return { data, width, row: (index) => data.subarray(index * width, (index + 1) * width) };
}

/** The site; `main.js` sets it before any view is shown. @type {Site} */
let site;

/** A chunk of a run. @template T @param {number} run @param {string} name @returns {Promise<T>} */
function ofRun(run, name) {
  return chunk(`${run}/${name}`);
}

/** The chunk that holds a concept's details, and its row there. @param {number} run @param {number} concept */
async function detailsOf(run, concept) {
  const per = site.per_chunk.concepts;
  /** @type {ConceptDetails} */
  const details = await ofRun(run, `concept_${Math.floor(concept / per)}`);
  return { details, row: concept % per };
}

/** The concepts that are active on an image, ascending, and their strengths.
 * @param {number} run @param {number} dataset @param {number} image */
async function strengthsOf(run, dataset, image) {
  const per = site.per_chunk.images;
  /** @type {Strengths} */
  const found = await ofRun(run, `strengths_${dataset}_${Math.floor(image / per)}`);
  const [start, end] = [found.indptr[image % per], found.indptr[(image % per) + 1]];
  return { concepts: found.indices.subarray(start, end), strengths: found.values.subarray(start, end) };
}

/** @type {{ run: number, rows?: Promise<(concept: number) => Float32Array> }} */
let keptWeights = { run: -1 };

/** The weights of a run's probe: concept -> its weight for every class. Those of one run are kept, whatever their size.
 * @param {number} run */
function weightsOf(run) {
  if (keptWeights.run !== run || !keptWeights.rows) keptWeights = { run, rows: readWeights(run) };
  keptWeights.rows?.catch(() => (keptWeights = { run: -1 }));
  return /** @type {Promise<(concept: number) => Float32Array>} */ (keptWeights.rows);
}

/** @param {number} run @returns {Promise<(concept: number) => Float32Array>} */
async function readWeights(run) {
  const { n_latents, weight_rows: rows } = site.runs[run];
  const names = Array.from({ length: Math.ceil(n_latents / rows) }, (_, k) => `weights_${k}`);
  const parts = await Promise.all(names.map((name) => /** @type {Promise<Weights>} */ (ofRun(run, name))));
  return (concept) => parts[Math.floor(concept / rows)].weight.row(concept % rows);
}
