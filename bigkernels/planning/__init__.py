"""What a run needs before it is started: memory, operations and time, by running it on tensors without memory."""

from ._plan import plan
from ._report import Choice, MemoryPlan, PhasePlan

__all__ = ["Choice", "MemoryPlan", "PhasePlan", "plan"]
