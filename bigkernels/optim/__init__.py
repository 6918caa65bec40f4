"""Optimizers whose step is one pass over memory, with states of 8 to 32 bits, on CPU and GPU."""

from ._algorithms import LAMB, SGD, Adagrad, Adam, AdamW, Lion, RMSprop
from ._muon import Muon, muon_groups
from ._norm import clip_grad_norm_, clip_grad_value_, get_total_norm
from ._optimizer import Optimizer

__all__ = [
    "LAMB",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Lion",
    "Muon",
    "Optimizer",
    "RMSprop",
    "clip_grad_norm_",
    "clip_grad_value_",
    "get_total_norm",
    "muon_groups",
]
