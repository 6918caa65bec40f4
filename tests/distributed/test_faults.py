"""A rank dies, is stopped or raises: the others get an error in time, and restarted runs end with the same losses."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = Path(__file__).parent / "faulty_training.py"
SLACK = 60.0  # seconds that a loaded machine may take beyond the time-out

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or not sys.platform.startswith("linux"),
    reason="this torch has no gloo",
)


def environment(**others: object) -> dict[str, str]:
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    given = {name: str(value) for name, value in others.items()} | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"} | given


def launched(folder: Path, backend: str, fault: str, at: float, **given: object) -> list[str]:
    """The losses of a run under torchrun."""
    folder.mkdir(exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "3",
        str(PROGRAM),
        str(folder),
        backend,
        fault,
        str(at),
    ]
    done = subprocess.run(command, env=environment(**given), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not [p for p in (folder / "checkpoints").rglob("*") if p.name.endswith(".tmp")]
    return (folder / "losses").read_text().split()


def leftovers() -> set[str]:
    return (
        {name for name in os.listdir("/dev/shm") if name.startswith("bigkernels-")}
        if os.path.isdir("/dev/shm")
        else set()
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    losses = launched(tmp_path_factory.mktemp("faults") / "none", "shared_memory", "none", 0)
    assert len(set(losses)) == len(losses)
    return losses


@pytest.mark.parametrize(
    ("fault", "backend", "at"),
    [("kill", "shared_memory", 0.35), pytest.param("raise", "gloo", 0.25, marks=pytest.mark.slow)],
    ids=lambda v: str(v),
)
def test_a_restarted_run_ends_with_the_same_losses(
    fault: str, backend: str, at: float, tmp_path: Path, undisturbed: list[str]
) -> None:
    before = leftovers()
    assert launched(tmp_path / "run", backend, fault, at) == undisturbed
    assert leftovers() <= before


@pytest.mark.parametrize("backend", ["shared_memory", pytest.param("gloo", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", ["kill", "raise", "stop"])
def test_the_others_get_an_error_in_time(fault: str, backend: str, tmp_path: Path) -> None:
    """Without anybody who would end them."""
    if (fault, backend) in (("raise", "gloo"), ("kill", "gloo")):
        pytest.skip("gloo notices a closed connection by itself")
    given = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _port(),
        "WORLD_SIZE": 2,
        "FAULTY_TIMEOUT": 3,
        "FAULTY_STOPPED": 8,
        "FAULTY_EVERY": 1000,  # gloo carries what checkpoints send, and has words of its own
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(tmp_path), backend, fault, "0.1"],
            env=environment(RANK=rank, **given),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, error = processes[0].communicate(timeout=SLACK + 30)
        assert processes[0].returncode not in (0, None)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    told = [line.split(" ", 2) for line in (tmp_path / "errors").read_text().splitlines()]
    seconds, message = next((float(s), text) for rank, s, text in told if rank == "0")
    assert seconds < 0.1 + 3 + SLACK
    if backend == "shared_memory":
        words = {"kill": "has died", "raise": "has ended", "stop": "did not arrive within 3 s"}
        assert "DistBackendError" in message and ("rank 1" in message and words[fault] in message), message
    assert error


def _port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_fifty_runs_with_faults_at_random_points(tmp_path: Path, undisturbed: list[str]) -> None:
    draw = random.Random(int(os.environ.get("FAULTY_SEED", "0")))
    for run in range(int(os.environ.get("FAULTY_RUNS", "50"))):
        fault, backend = draw.choice(["kill", "stop", "raise"]), draw.choice(["shared_memory", "gloo"])
        at, begin = draw.uniform(0.0, 1.0), time.monotonic()
        losses = launched(tmp_path / f"run{run}", backend, fault, at, FAULTY_TIMEOUT=5)
        print(f"run {run}: {fault} after {at:.2f} s over {backend}: {time.monotonic() - begin:.1f} s", flush=True)
        assert losses == undisturbed, (run, fault, backend, at)
    assert not leftovers()


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-m", "slow", "-s"]))
