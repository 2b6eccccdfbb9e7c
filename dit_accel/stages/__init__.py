"""The six axes of a recipe: order, select, compensate, precision, schedule, reuse."""
