"""Choosing blocks: pooled scores, exact mass, thresholds, and what stands in for the rest."""
