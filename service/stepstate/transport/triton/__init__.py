"""The Triton API: `inference.GRPCInferenceService`, for clients made for Triton.

Its messages come from the package `tritonclient` (the extra `stepstate[triton]`), since protobuf
refuses two copies of one proto file in a process. Triton's words (sequence, start, end) appear in
this folder only; `docs/triton.md` maps them to those of stepstate.
"""

from stepstate.transport.triton.service import TritonService

__all__ = ["TritonService"]
