"""Attention masks: which keys each query attends to, as constructors and as bands of integers."""

from longspan.masks.bands import Band as Band
from longspan.masks.constructors import Bands as Bands
