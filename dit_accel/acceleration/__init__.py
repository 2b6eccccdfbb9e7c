"""What makes a run faster beside attention: compiled blocks, low-precision linear layers, a faster decoder."""
