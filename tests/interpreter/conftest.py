"""Runs the Triton kernels on CPU tensors, in Triton's interpreter, behind the public functions.

Triton reads TRITON_INTERPRET when a kernel is defined, so these tests need a process of their own: run them with
`TRITON_INTERPRET=1 pytest tests/interpreter`, as tests/test_interpreter.py does.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
