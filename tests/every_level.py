"""What a process at another ISA level runs: all operators' samples, which say what is wrong."""

from __future__ import annotations

CHECK = "import sys; from bigkernels._cli import main; sys.exit(main(['check', '--device', 'cpu']))"
EVERY_PATH = (
    "import sys; sys.path.insert(0, 'tests'); sys.path.insert(0, 'tests/ops')\n"
    "from test_recipe import ALL, KERNEL_DTYPES, every_path, named\n"
    "for sample in ALL:\n"
    "    for dtype in KERNEL_DTYPES:\n"
    "        if wrong := every_path(sample, dtype, (1, 3)): print(named(sample), dtype, wrong)"
)
