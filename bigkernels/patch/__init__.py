"""Fuse norms, rotary embedding, gated MLPs and losses of one model: found by structure, checked by numbers, reversible.

`patch(model)` writes only into instances: a module's own `__dict__` gets a `forward` that goes before its class's. No
module is replaced and no class changes, so parameters, `state_dict` keys, hooks and other models stay as they are, and
`unpatch(model)` puts back exactly what was there. The one change outside is temporary: while a patched model of
transformers makes its masks, the library's registry of mask builders has one more.

How a rule works, and how to add one, is in `README.md` beside this file.
"""

from ._api import patch, patched, unpatch
from ._metrics import LossMetrics
from ._report import PatchReport, Row

__all__ = ["LossMetrics", "PatchReport", "Row", "patch", "patched", "unpatch"]
