"""Kernels prove themselves: each against float64 on the chip that is here, in a process that may crash or hang.

    cases.py       what is computed, and the right results
    check.py       a kernel on a case, and how far off it may be
    speed.py       how fast kernels and decoding forwards are, for `sdar-jax doctor --prove`
    tiles.py       which block shapes of the attention kernels are fastest
    __main__.py    the process: writes what it finds, line by line

`sdar_jax.verdicts` starts it and judges what it wrote.
"""
