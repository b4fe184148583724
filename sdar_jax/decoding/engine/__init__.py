"""Continuous batching, in parts that each stand alone.

    Engine          the face, and its lock: submit, stream, result, cancel, generate, update_weights, stats
    EngineCore      the loop: a step admits, runs the device once, takes out what ended; knows no threads
    InputProcessor  a prompt and a config to a checked request
    Scheduler       the queue, slots of the batch, pages, preemption; knows no device
    ModelRunner     the batch on the device; knows no queue
    Recovery        what an interruption may leave half done is built anew
    Stats           what is counted

What streams give is in `decoding.events`, stop strings are found in `decoding.text`, and `decoding.page_pool` knows
which page belongs to whom.
"""

from sdar_jax.decoding.engine.engine import Engine
from sdar_jax.decoding.engine.statistics import Stats

__all__ = ["Engine", "Stats"]
