"""What `quantize` does to a model: a plan, which changes nothing, and its steps, each of which can be undone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ._calibration import groups, hessians
from ._report import QuantizeReport, Row
from ._ties import name_codes
from ._weight import QuantizedWeight, quantize_weight
from .format import Format
from .layers import rows
from .qat import plain_kind
from .select import Chosen, put, select


class Journal:
    """What was put into a model, last things last."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._undo: list[Callable[[], None]] = []

    def layer(self, chosen: Chosen, made: nn.Module) -> None:
        put(self.model, chosen.paths, made)
        self._undo.append(lambda: put(self.model, chosen.paths, chosen.module))

    def parameter(self, path: str, made: nn.Module) -> None:
        owner, _, key = path.rpartition(".")
        module = self.model.get_submodule(owner)
        before = getattr(module, key)
        delattr(module, key)
        setattr(module, key, made)
        self._undo.append(lambda: set_parameter(self.model, path, before))

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()


@dataclass
class Layers:
    """A step: the layers that read one weight, of which all but the first share the first one's codes."""

    members: list[Chosen]
    format: Format

    @property
    def first(self) -> Chosen:
        return self.members[0]

    def weight(self) -> Tensor:
        return rows(self.first.module, plain_kind(self.first.module))

    @property
    def measured(self) -> bool:
        """Whether it needs the second moments of the layer's inputs."""
        return self.format.calibrated and not self.first.module.weight.is_meta

    @property
    def stored(self) -> dict[str, tuple[str, ...]]:
        """The names of stored tensors by the paths of layers that share them."""
        if len(self.members) == 1:
            return {}
        n, k = self.weight().shape
        names = tuple(self.format.layout((n, k)))
        return {path: names for chosen in self.members for path in chosen.paths}

    def write(self, journal: Journal, hessian: Tensor | None = None) -> list[Row]:
        from ..nn import QuantizedEmbedding, QuantizedLinear

        weight = self.weight()
        quantized = quantize_weight(weight, self.format, hessian)
        sizes, error, source, layers = (weight.nbytes, quantized.nbytes), error_of(weight, quantized), None, []
        for chosen in self.members:
            kind = plain_kind(chosen.module)
            layer: Any = QuantizedEmbedding if kind is nn.Embedding else QuantizedLinear
            module = layer.standing_for(chosen.module, quantized, kind)
            journal.layer(chosen, module)
            what = ", also ".join((self.format.name, *(chosen.paths[1:] if len(self.members) == 1 else ())))
            if source is None:
                source = module
            else:
                module.share(source)
                # transformers asks for it when it saves: these tensors are those of another module.
                module._tied_weights_keys = {name: f"{self.first.path}.{name}" for name in quantized.tensors}
                what += f", the weight of {self.first.path}"
            layers.append(Row(chosen.path, what, *sizes, error))
            sizes = 0, 0
        return layers


@dataclass
class Experts:
    """A step: the weights of experts, a parameter of their module."""

    path: str
    format: Format

    def write(self, journal: Journal) -> list[Row]:
        from ..nn import QuantizedExperts

        owner, _, key = self.path.rpartition(".")
        module = journal.model.get_submodule(owner)
        weight = getattr(module, key)
        experts = QuantizedExperts.from_parameter(
            weight, self.format, transposed=getattr(module, "is_transposed", False)
        )
        journal.parameter(self.path, experts.train(module.training))
        flat = (weight.transpose(1, 2) if experts.transposed else weight).flatten(0, 1)
        error = error_of(flat, experts.qweight)
        return [Row(self.path, self.format.name, weight.nbytes, experts.qweight.nbytes, error)]


@dataclass
class Plan:
    """The steps, those that need to know the inputs of layers in `measured`, and what was decided against."""

    model: nn.Module
    steps: list[Experts | Layers] = field(default_factory=list)
    measured: list[Layers] = field(default_factory=list)
    order: dict[str, int] = field(default_factory=dict)
    report: QuantizeReport = field(default_factory=QuantizeReport)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        format: str | Format | Mapping[str, str | Format | None],
        skip: str | tuple[str, ...],
        filter: Callable[[str, nn.Module], bool] | None,
        embeddings: bool,
    ) -> Plan:
        plan = cls(model)
        selection = select(model, format, skip, filter, embeddings, plan.report)
        plan.order = selection.order
        plan.steps += (Experts(path, chosen) for path, chosen in selection.experts.items())
        plan.steps += (Layers(members, members[0].format.blind()) for members in selection.shared)
        for chosen in selection.alone:
            ids = plain_kind(chosen.module) is nn.Embedding  # what it reads tells nothing
            step = Layers([chosen], chosen.format.blind() if ids else chosen.format)
            (plan.measured if step.measured else plan.steps).append(step)
        return plan

    def write(self, calibration: Iterable[Any] | None) -> QuantizeReport:
        """Take all steps, or none.

        Raises:
            ValueError: a format is calibrated and there are no batches, or a weight cannot be stored.
        """
        if self.measured and calibration is None:
            format = self.measured[0].format
            raise ValueError(f"bigkernels.quantize: {format} is calibrated; give calibration batches")
        journal, report = Journal(self.model), self.report
        try:
            for step in self.steps:
                report.quantized += step.write(journal)
            if self.measured and calibration is not None:
                self._write_measured(journal, calibration if isinstance(calibration, Sequence) else list(calibration))
        except BaseException:
            journal.undo()
            raise
        stored: dict[str, tuple[str, ...]] = {}
        for step in self.steps:
            stored |= step.stored if isinstance(step, Layers) else {}
        name_codes(self.model, stored)
        for listed in (report.quantized, report.skipped):
            listed.sort(key=lambda row: self.order.get(row.path, self.order.get(row.path.rpartition(".")[0], 0)))
        return report

    def _write_measured(self, journal: Journal, batches: Sequence[Any]) -> None:
        steps = {step.first.path: step for step in self.measured}
        for some in groups({path: step.weight().shape[1] for path, step in steps.items()}):
            statistics = hessians(self.model, {path: steps[path].first.module for path in some}, batches)
            for path in some:
                if path in statistics:
                    self.report.quantized += steps[path].write(journal, statistics[path])
                else:
                    weight: Any = steps[path].first.module.weight
                    self.report.skip(path, "no calibration batch reaches it", weight.nbytes)


def set_parameter(model: nn.Module, path: str, weight: nn.Parameter) -> None:
    owner, _, key = path.rpartition(".")
    module = model.get_submodule(owner)
    module._modules.pop(key, None)
    setattr(module, key, weight)


def error_of(weight: Tensor, quantized: QuantizedWeight) -> float | None:
    """Root mean square of the error over that of the weight."""
    if weight.is_meta:
        return None
    error = total = 0.0
    values = quantized.dequantize(torch.float32)
    for a, b in zip(weight.detach().split(1024), values.split(1024), strict=True):
        error += (a.double() - b.double()).square().sum().item()
        total += a.double().square().sum().item()
    return (error / total) ** 0.5 if total else 0.0
