"""Block-sparse attention in 8-bit integers and floats."""
