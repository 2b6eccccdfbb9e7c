"""Recipes whose blocks suit sequences of a hundred tokens."""

from dit_accel import Recipe
from dit_accel.stages.order.simple import Tiles
from dit_accel.stages.select.pooled import Pooled
from dit_accel.stages.select.static import Window

SMALL_TILES = Tiles((2, 2, 4))
POOLED = Recipe(order=SMALL_TILES, select=Pooled(density=0.4, block=(32, 32)))
POOLED_FULL = Recipe(order=SMALL_TILES, select=Pooled(density=1.0, block=(32, 32)))
WINDOW = Recipe(order=SMALL_TILES, select=Window(window=(1.0, 0.5, 0.5), block=(32, 32)))
