"""Which key blocks a query block reads."""
