"""Losses have the names that TRL gives them, and GRPO's the values that its trainer computes."""

from __future__ import annotations

import collections
import re
from types import SimpleNamespace

import pytest
import torch

from bigkernels import losses
from bigkernels.losses import _free, _pairs, _policy

trl = pytest.importorskip("trl")
B, S = 4, 7


def _help(config: type) -> str:
    return config.__dataclass_fields__["loss_type"].metadata["help"]


def test_names():
    named = set(re.findall(r"`'(\w+)'`", _help(trl.DPOConfig)))
    assert {"sigmoid", "apo_down", "sigmoid_norm"} <= named <= set(_pairs.LOSSES)
    named = set(re.findall(r"'(\w+)'", _help(trl.GRPOConfig)))
    assert {"dapo", "cispo", "vespo"} <= named & set(_policy.LOSSES)
    cpo = pytest.importorskip("trl.experimental.cpo").CPOConfig
    assert set(cpo.__dataclass_fields__["loss_type"].metadata["choices"]) <= set(_free.CPO)


class _Accelerator:
    num_processes, device, sync_gradients = 1, "cpu", False

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.dim() else x[None]

    def reduce(self, x: torch.Tensor, reduction: str) -> torch.Tensor:
        return x


def _theirs(name, level, beta, delta, high, logprobs, inputs):
    """The trainer's loss, of a trainer that has nothing but what it reads."""
    trainer = trl.GRPOTrainer
    args = SimpleNamespace(
        use_bias_correction_kl=True,
        delta=delta,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
        steps_per_generation=1,
    )
    stand = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros(B, S), None),
        args=args,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        beta=beta,
        loss_type=name,
        importance_sampling_level=level,
        epsilon_low=0.2,
        epsilon_high=high,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True),
        accelerator=_Accelerator(),
        current_gradient_accumulation_steps=1,
        max_completion_length=9,
        _entropy_bonus_enabled=False,
        _metrics={"train": collections.defaultdict(list)},
        get_gamma_weights=trainer.get_gamma_weights,
    )
    return trainer._compute_loss(stand, None, inputs)


CASES = [(name, importance) for name, row in _policy.LOSSES.items() for importance in row.importance]


@pytest.mark.skipif(not trl.__version__.startswith("1.16."), reason="reads the trainer's private parts as of TRL 1.16")
@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
@pytest.mark.parametrize("name, level", CASES)
def test_grpo(name, level, mode):
    logprobs = (-2 * torch.rand(B, S)).requires_grad_()
    old, ref = (logprobs.detach() + 0.5 * torch.randn(B, S) for _ in range(2))
    sampler, advantages = old - 0.3 * torch.randn(B, S), torch.randn(B)
    mask = (torch.rand(B, S) > 0.3).long()
    mask[:, 0] = 1
    clips, high = _policy.LOSSES[name].losses is _policy._clip, 1.4 if name == "cispo" else 0.28
    ratio = losses.sampler_ratios(old, sampler, mask, mode=mode, clip_max=1.3)
    columns = {name: torch.zeros(B, S, dtype=torch.int64) for name in ("prompt_ids", "prompt_mask", "completion_ids")}
    theirs = _theirs(
        name,
        level,
        0.1,
        1.5 if clips else None,
        high,
        logprobs,
        columns
        | {
            "completion_mask": mask,
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
            "num_items_in_batch": torch.tensor(31),
            "importance_sampling_ratio": ratio.view(B, -1),
        },
    )
    options = {"clip_high": high, "delta": 1.5} if clips else {"cispo_max": high} if name == "cispo" else {}
    options |= {"dr_grpo": {"max_length": 9}, **dict.fromkeys(("dapo", "cispo", "vespo"), {"num_tokens": 31})}.get(
        name, {}
    )
    ours = losses.grpo_loss(
        logprobs,
        old,
        advantages,
        mask,
        ref_logprobs=ref,
        beta=0.1,
        bias_correction_kl=True,
        sampler_ratio=ratio,
        loss_type=name,
        importance=level,
        **options,
    ).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(loss, logprobs) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
