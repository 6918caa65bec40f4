"""The command line: `bigkernels info | check | bench | plan | demo`, also `python -m bigkernels`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

from .._version import __version__

# name: (module with add_arguments(parser) and run(args) -> exit code, one line of help)
COMMANDS = {
    "info": ("bigkernels._cli.info", "versions, CPU and GPUs, and which implementations run on this machine"),
    "check": ("bigkernels._cli.check", "run every operator here and compare it with its float64 reference"),
    "bench": ("bigkernels._cli.bench", "time the operators against PyTorch, torch.compile and installed peers"),
    "plan": ("bigkernels._cli.plan", "what a training step or a generation will need, without running it"),
    "formats": (
        "bigkernels.demo.formats",
        "a pretrained language model in every weight format: perplexity, size, speed",
    ),
    "demo": ("bigkernels.demo", "fine-tune and run a pretrained language model, plain and patched"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 success, 1 a failed check, 2 wrong usage or something missing)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="bigkernels", description="Kernels that make transformer models run faster.")
    parser.add_argument("--version", action="version", version=f"bigkernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    # Only the chosen command is imported: the others may need packages that are not installed.
    chosen = next((a for a in argv if not a.startswith("-")), None)
    run: Callable[[argparse.Namespace], int] | None = None
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == chosen:
            loaded = importlib.import_module(module)
            loaded.add_arguments(command)
            run = loaded.run
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # with the usage of the command, which `parse_args` leaves out
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    assert run is not None  # `parse_known_args` has left where no command is named
    try:
        return run(args)
    except KeyboardInterrupt:
        return 130
