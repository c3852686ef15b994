"""`python -m llm_edge.finetune`: `llm-finetune`."""

from llm_edge.finetune.cli import main

if __name__ == "__main__":
    main()
