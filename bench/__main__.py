"""`python -m llm_edge.bench`: `llm-bench`."""

from llm_edge.bench.cli import main

if __name__ == "__main__":
    main()
