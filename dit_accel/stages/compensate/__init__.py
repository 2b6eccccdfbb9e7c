"""What stands in for the blocks left out."""
