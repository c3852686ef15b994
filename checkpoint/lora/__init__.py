"""LoRA adapters in peft's format."""
