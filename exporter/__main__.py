"""`python -m llm_edge.exporter`: `llm-export`."""

from llm_edge.exporter.cli import main

if __name__ == "__main__":
    main()
