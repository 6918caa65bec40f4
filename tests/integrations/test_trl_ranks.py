"""TRL's trainers with this package's head and losses on two ranks: the same history as TRL's own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")
pytest.importorskip("transformers", minversion="5")
pytest.importorskip("peft")

from ranks import Checks  # noqa: E402

checks = Checks(__file__, ranks=2)
FSDP = {"fsdp": "full_shard", "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
CASES = {
    "DPO": {},
    "DPO with adapters": {"adapters": True},
    "KTO": {},
    "GRPO": {"num_iterations": 2, "beta": 0.0},
    "DPO, FSDP2": FSDP,
    "KTO, FSDP2": FSDP,
    "GRPO, FSDP2": FSDP | {"beta": 0.0},
}


@checks(*CASES)
def history(case: str) -> None:
    from integrations.test_trl_fuse import fuse, make, same_history

    kind, options = case[:4].strip(" ,"), CASES[case]
    folder = Path(os.environ["FOLDER"]) / f"{case} {os.environ['RANK']}"
    histories = []
    for ours in (False, True):
        trainer = make(kind, folder, per_device_train_batch_size=2, **options)
        assert trainer.accelerator.num_processes == 2
        if ours:
            assert fuse(trainer).loss == f"{kind.lower()}_loss"
        trainer.train()
        histories.append(trainer.state.log_history)
    same_history(*histories)


outcomes = checks.fixture()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", checks.names)
def test_ranks(name, outcomes):
    checks.judge(outcomes[name])


if __name__ == "__main__":
    rank = sys.argv[1]
    os.environ |= {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    checks.main()
