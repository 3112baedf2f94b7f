"""The engine: arena, cells and micro-batcher. The only part that imports torch."""

from stepstate.engine.engine import Engine, Observer, use_one_thread
from stepstate.engine.work import Floats, Layers, Owner, Work

__all__ = ["Engine", "Floats", "Layers", "Observer", "Owner", "Work", "use_one_thread"]
