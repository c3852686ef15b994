"""`python -m llm_edge.tui`: `llm-chat`."""

from llm_edge.tui.cli import main

if __name__ == "__main__":
    main()
