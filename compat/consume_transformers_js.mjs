// Greedy tokens of a bundle in transformers.js. Runs in a folder with node_modules of its own and knows nothing of
// llm-edge. `run.py` writes the job to standard input and names the file for the answer.

import { readFileSync, writeFileSync } from 'node:fs';
import { basename, dirname } from 'node:path';
import { AutoModelForCausalLM, AutoTokenizer, env } from '@huggingface/transformers';

// How transformers.js calls the files; from its README, "Using quantized models (dtypes)".
const DTYPES = {
    'model.onnx': 'fp32',
    'model_fp16.onnx': 'fp16',
    'model_quantized.onnx': 'q8',
    'model_int8.onnx': 'int8',
    'model_q4.onnx': 'q4',
};

const job = JSON.parse(readFileSync(0, 'utf8'));
const read = (path) => JSON.parse(readFileSync(path, 'utf8'));
const installed = (name) => read(new URL(`node_modules/${name}/package.json`, import.meta.url)).version;

env.allowRemoteModels = false;
env.localModelPath = `${dirname(job.bundle)}/`;
const name = basename(job.bundle);
const dtype = DTYPES[basename(job.model)];
if (dtype === undefined) throw new Error(`transformers.js has no dtype for ${job.model}`);
const byDefault = read(`${job.bundle}/config.json`)['transformers.js_config']?.dtype === dtype;

const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name, byDefault ? {} : { dtype });

const answers = [];
for (const prompt of job.prompts) {
    const inputs = prompt.messages
        ? tokenizer.apply_chat_template(prompt.messages, { add_generation_prompt: true, return_dict: true })
        : tokenizer(prompt.text);
    const output = await model.generate({ ...inputs, max_new_tokens: job.tokens, do_sample: false });
    const ids = output.tolist()[0].map(Number);
    const length = inputs.input_ids.dims[1];
    answers.push({ prompt: ids.slice(0, length), tokens: ids.slice(length) });
}
writeFileSync(
    process.argv[2],
    JSON.stringify({
        version: installed('@huggingface/transformers'),
        onnxruntime: installed('onnxruntime-node'),
        chosen: byDefault ? 'by default' : 'by dtype',
        answers,
    }),
);
