"""Masks: who attends to whom, as constructors and as bands of integers."""

from longspan.masks.bands import Band as Band
from longspan.masks.constructors import Bands as Bands
