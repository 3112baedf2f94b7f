"""The Triton front door: `inference.GRPCInferenceService`, for clients made for Triton.

Its messages come from the package `tritonclient` (the extra `stepstate[triton]`), since two
copies of one proto in a process collide. Triton's words (sequence, start, end) appear in this
folder only; `docs/triton.md` maps them.
"""

from stepstate.transport.triton.service import TritonService

__all__ = ["TritonService"]
