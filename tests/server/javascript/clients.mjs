// Asks a server through the npm packages `openai` and `ai`; prints what they return as JSON.
// Usage: node clients.mjs BASE_URL MODEL

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, streamText, tool } from "ai";
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const messages = [{ role: "user", content: "Hello" }];
const parameters = {
  type: "object",
  properties: { city: { enum: ["Paris", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};
const found = {};

const client = new OpenAI({ baseURL, apiKey: "unused", maxRetries: 0 });
const greedy = { model, messages, temperature: 0, max_tokens: 12 };
found.openai = (await client.chat.completions.create(greedy)).choices[0].message.content;
const runner = client.chat.completions.stream({ ...greedy, stream_options: { include_usage: true } });
found.openaiStream = (await runner.finalChatCompletion()).choices[0].message.content;
found.openaiUsage = (await runner.totalUsage()).completion_tokens;
const called = await client.chat.completions.create({
  ...greedy,
  max_tokens: 200,
  tools: [{ type: "function", function: { name: "weather", parameters } }],
  tool_choice: "required",
  parallel_tool_calls: false,
});
found.openaiCall = called.choices[0].message.tool_calls[0].function;
found.openaiResponse = (
  await client.responses.create({ model, input: "Hello", temperature: 0, max_output_tokens: 12 })
).output_text;

const provider = createOpenAICompatible({ name: "llm-edge", baseURL, includeUsage: true });
const options = { model: provider(model), messages, temperature: 0, maxOutputTokens: 12, maxRetries: 0 };
const whole = await generateText(options);
found.ai = whole.text;
found.aiFinish = whole.finishReason;
found.aiUsage = whole.usage.outputTokens;
const streamed = streamText(options);
found.aiStream = "";
for await (const part of streamed.textStream) {
  found.aiStream += part;
}
found.aiStreamFinish = await streamed.finishReason;
const weather = tool({ description: "The weather", inputSchema: jsonSchema(parameters) });
const tools = { ...options, maxOutputTokens: 200, tools: { weather }, toolChoice: "required" };
found.aiCall = (await generateText(tools)).toolCalls[0];
const calls = streamText(tools);
found.aiStreamCall = (await calls.toolCalls)[0];

console.log(JSON.stringify(found));
