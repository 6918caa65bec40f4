"""Optimizers whose step is one pass over memory, with states of 8 to 32 bits, on CPU and GPU."""

from ._algorithms import LAMB, SGD, Adagrad, Adam, Adamax, AdamW, Lion, RMSprop
from ._backward import accumulate_in_float32, step_in_backward
from ._muon import Muon, muon_groups
from ._norm import clip_grad_norm_, clip_grad_value_, get_total_norm
from ._offload import offload_states
from ._optimizer import Optimizer

__all__ = [
    "LAMB",
    "SGD",
    "Adagrad",
    "Adam",
    "Adamax",
    "AdamW",
    "Lion",
    "Muon",
    "Optimizer",
    "RMSprop",
    "accumulate_in_float32",
    "clip_grad_norm_",
    "clip_grad_value_",
    "get_total_norm",
    "muon_groups",
    "offload_states",
    "step_in_backward",
]
