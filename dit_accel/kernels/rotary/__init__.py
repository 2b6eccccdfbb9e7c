"""Rotary position embedding of queries and keys on their way to attention."""
