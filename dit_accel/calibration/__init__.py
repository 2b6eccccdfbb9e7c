"""What is worked out offline: plans of a few prompts' runs, and densities per head."""
