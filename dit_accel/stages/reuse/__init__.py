"""What later steps take from earlier ones in place of computing all blocks."""
