"""Fine-tuning of models under sparse attention, and adapters to share the result."""
