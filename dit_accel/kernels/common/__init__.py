"""What several operators share: what a device can do, and launch settings."""
