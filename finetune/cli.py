"""The `llm-finetune` command line. Arguments are parsed before torch is imported, so that `--help` is fast."""

from __future__ import annotations

import sys

from llm_edge.finetune import check_cli


def main() -> None:
    """Entry point of `llm-finetune`."""
    if sys.argv[1:2] == ["check"]:
        check_cli.app(args=sys.argv[2:], prog_name="llm-finetune check")
    check_cli.app(prog_name="llm-finetune check")
