"""`python -m llm_edge.server`: the command `llm-serve`."""

from llm_edge.server.cli import main

if __name__ == "__main__":
    main()
