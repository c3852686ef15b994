"""Chat templates that write calls of tools as common families do, and bundles of tiny models with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions

_TURNS = """{%- if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{{ message.content or '' }}
{%- if message.tool_calls %}CALLS{%- endif %}{{ '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"""
_HERMES = """{%- for call in message.tool_calls %}{{ '<tool_call>\n{"name": "' + call.function.name + '", "arguments": '
+ (call.function.arguments | tojson) + '}\n</tool_call>' }}{%- if not loop.last %}{{ '\n' }}{%- endif %}{%- endfor %}"""
_LLAMA = """{%- if message.tool_calls | length > 1 %}{{ raise_exception('one call') }}{%- endif %}
{%- for call in message.tool_calls %}{{ '{"name": "' + call.function.name + '", "parameters": '
+ (call.function.arguments | tojson) + '}' }}{%- endfor %}"""
_MISTRAL = """{{ '[TOOL_CALLS][' }}{%- for call in message.tool_calls %}{{ call.function | tojson }}
{%- if not loop.last %}{{ ', ' }}{%- endif %}{%- endfor %}{{ ']' }}"""
_XML = """{%- for call in message.tool_calls %}{{ '<tool_call>\n<function=' + call.function.name + '>\n' }}
{%- for key, value in call.function.arguments.items() %}{{ '<parameter=' + key + '>\n' }}
{{- value if value is string else value | tojson }}
{{- '\n</parameter>\n' }}{%- endfor %}{{ '</function>\n</tool_call>' }}{%- endfor %}"""
_PYTHONIC = """{{ '[' }}{%- for call in message.tool_calls %}{{ call.function.name + '(' }}
{%- for key, value in call.function.arguments.items() %}{{ key + '=' }}{{ value | tojson }}
{%- if not loop.last %}{{ ', ' }}{%- endif %}{%- endfor %}{{ ')' }}{%- if not loop.last %}{{ ', ' }}{%- endif %}
{%- endfor %}{{ ']' }}"""
TEMPLATES = {
    name: _TURNS.replace("CALLS", calls.replace("\n+", " +").replace("\n{%-", "{%-").replace("\n{{-", "{{-"))
    for name, calls in (
        ("hermes", _HERMES),
        ("llama", _LLAMA),
        ("mistral", _MISTRAL),
        ("xml", _XML),
        ("pythonic", _PYTHONIC),
    )
}
TEMPLATES["none"] = tiny.CHAT_TEMPLATE


def export_with(template: str, folder: Path, source: Path, **config: Any) -> None:
    """Export a tiny model in fp32 whose chat template is this one; `source` is a folder for the checkpoint."""
    tiny.save_checkpoint(source, **config)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    for other in source.glob("chat_template*"):
        other.unlink()
    export(str(source), ExportOptions(folder, precision="fp32", validate=False))
