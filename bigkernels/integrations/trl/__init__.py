"""TRL: this package's products and losses in its trainers.

`fuse(trainer)` is the one call: log probabilities come from hidden states, without logits over the vocabulary, and the
loss from `bigkernels.losses`. `use_head` does the first for one model, and
`bigkernels.integrations.transformers.TrainerCallback` calls it for the model that is trained.
"""

from ._fuse import Fused, fuse
from ._head import use_head

__all__ = ["Fused", "fuse", "use_head"]
