// Greedy tokens of a decoder graph in onnxruntime-web (WASM, one thread). A job in JSON on standard input:
// { graph, data: [names of external data], prompts: [[ids]], tokens, stop: [ids], cache: [[name, heads, size]] }.
// One JSON line on standard output: the new ids of every prompt, ended before the first stop id.
import { readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import * as ort from 'onnxruntime-web/wasm';

const job = JSON.parse(readFileSync(0, 'utf8'));
ort.env.wasm.numThreads = 1;
ort.env.logLevel = 'error';

const int64 = (values) => new ort.Tensor('int64', BigInt64Array.from(values, BigInt), [1, values.length]);
const range = (start, end) => Array.from({ length: end - start }, (_, index) => start + index);

function argmax(logits) {
  const size = logits.dims[2];
  const last = logits.data.subarray(logits.data.length - size);
  return last.reduce((best, value, index) => (value > last[best] ? index : best), 0);
}

function emptyCache() {
  return Object.fromEntries(
    job.cache.map(([name, heads, size]) => [name, new ort.Tensor('float32', [], [1, heads, 0, size])]),
  );
}

async function answer(session, prompt) {
  const found = [];
  let cache = emptyCache();
  for (let ids = prompt, seen = 0; found.length < job.tokens; ids = [found.at(-1)]) {
    const feeds = {
      input_ids: int64(ids),
      attention_mask: int64(new Array(seen + ids.length).fill(1)),
      position_ids: int64(range(seen, seen + ids.length)),
    };
    const wanted = Object.entries(feeds).filter(([name]) => session.inputNames.includes(name));
    const outputs = await session.run({ ...Object.fromEntries(wanted), ...cache });
    const token = argmax(outputs.logits);
    if (job.stop.includes(token)) break;
    found.push(token);
    seen += ids.length;
    cache = Object.fromEntries(
      job.cache.map(([name]) => [name, outputs[name.replace('past_key_values', 'present')]]),
    );
  }
  return found;
}

const session = await ort.InferenceSession.create(readFileSync(job.graph), {
  executionProviders: ['wasm'],
  externalData: job.data.map((path) => ({ path, data: readFileSync(join(dirname(job.graph), path)) })),
});
const answers = [];
for (const prompt of job.prompts) answers.push(await answer(session, prompt));
console.log(JSON.stringify(answers));
