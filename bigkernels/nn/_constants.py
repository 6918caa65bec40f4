"""Buffers that are constants of a formula and not weights."""

from __future__ import annotations

from typing import Any

from torch import nn


class KeepsConstants(nn.Module):
    """A module whose buffers move with it and keep their dtype when it is cast.

    A frequency rounded to bfloat16 is wrong by radians after a thousand positions.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, constant in before.items():
            now = self._buffers[name]
            if now is not None and constant is not None and now.dtype != constant.dtype:
                self._buffers[name] = constant.to(now.device)
        return self
