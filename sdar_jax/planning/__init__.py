"""Plans what a run will need, before a machine is rented: the real step compiled for devices that are not here."""

from sdar_jax.planning.compile import Compiled, Memory, compile_step
from sdar_jax.planning.nearest import Change, nearest
from sdar_jax.planning.report import nearest_lines, table, values
from sdar_jax.planning.roofline import Roofline, roofline

__all__ = [
    "Change",
    "Compiled",
    "Memory",
    "Roofline",
    "compile_step",
    "nearest",
    "nearest_lines",
    "roofline",
    "table",
    "values",
]
