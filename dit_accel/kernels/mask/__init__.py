"""Block masks: which key blocks each query block reads, as lists, as bits, and transposed."""
