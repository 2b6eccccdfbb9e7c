"""The five axes of a recipe: order, select, compensate, precision, schedule."""
