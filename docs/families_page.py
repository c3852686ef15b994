"""Writes the table of architectures into docs/families.md: `python docs/families_page.py`."""

from __future__ import annotations

from pathlib import Path

from llm_edge.exporter.families import Route, families

PAGE = Path(__file__).with_name("families.md")
BEGIN, END = "<!-- begin of the table that `make docs` writes -->\n", "<!-- end of the table -->\n"


def table() -> str:
    """The architectures by route."""
    routes = families()
    lines = ["| exported by | `model_type` |", "|---|---|"]
    for route in Route:
        names = [f"`{name}`" for name, each in routes.items() if each is route]
        lines.append(f"| {route.value} ({len(names)}) | {', '.join(names)} |")
    return "\n".join(lines) + "\n"


def written(page: str) -> str:
    """The page with the current table."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
