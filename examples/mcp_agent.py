"""An MCP client whose model is served by llm-serve: the model calls the tools of an MCP server.

    pip install mcp openai
    python examples/mcp_agent.py MODEL "QUESTION" COMMAND [ARGS]

COMMAND starts an MCP server that speaks over standard input and output. The model has to call one of its tools, and
then answers with the result.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from mcp import Client, StdioServerParameters
from openai import AsyncOpenAI

URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")


async def answer(model: str, question: str, command: str, *arguments: str) -> str:
    """The model's answer to a question after a call of a tool."""
    messages: list[Any] = [{"role": "user", "content": question}]
    server = StdioServerParameters(command=command, args=list(arguments))
    async with Client(server) as tools, AsyncOpenAI(base_url=URL, api_key="none") as models:
        offered: Any = [
            {
                "type": "function",
                "function": {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema},
            }
            for tool in (await tools.list_tools()).tools
        ]
        asked = await models.chat.completions.create(
            model=model, messages=messages, tools=offered, tool_choice="required", parallel_tool_calls=False
        )
        message: Any = asked.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            result = await tools.call_tool(call.function.name, json.loads(call.function.arguments))
            text = "\n".join(part.text for part in result.content if part.type == "text")
            print(f"{call.function.name}({call.function.arguments}) -> {text}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": text})
        done = await models.chat.completions.create(model=model, messages=messages, max_tokens=200)
        return done.choices[0].message.content or ""


if __name__ == "__main__":
    print(asyncio.run(answer(*sys.argv[1:])))
