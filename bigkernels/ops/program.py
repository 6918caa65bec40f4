"""The raw operators of `bigkernels.program`: a model's step over records, which are addresses and sizes as numbers.

The records are those of csrc/include/bigkernels/program.h; bigkernels/program/_records.py mirrors them, and a program
keeps alive what they point to. Nobody else should call these: there is no way to check an address.

`program` is a uint8 tensor (`_records.pack`), `hidden` (B, S, width) floating, `positions` (B, S) int64, `starts` (B,)
int64, `caches` int64 with a LayerCache a row, `angles` int64 with an AngleTable a row, `logits` (B, keep, V) floating.

`program_encode` is a whole run of an encoder's program: `sequences` (n, 3) int64, each the number of a text in the
batch of `hidden` (B, S, width), its first token there and its length; `scores` int64 with a ScoresTable a row; `out`
(B, S, width) gets the rows of the sequences, of which some `most` are computed at once.

`program_run` is a whole step; where no rows are kept, it fills the caches and makes no logits. Where the model's own
code runs in between (call records), the same in pieces: `program_start` gives a run's number, `program_step` runs up to
the next call record and returns its index, or -1 at the end; at either, values are read and written as (B, S, width)
tensors; `program_finish` ends the run, whatever happened.

`program_panel_bytes` says how much memory panels of the program's codes take, and `program_make_panels` makes them, in
memory on a cache line, before the program runs for the first time: what a few tokens are multiplied with from then on.
The caller keeps the memory alive, and makes another program where the codes change. `program_checksums` tells: of
pieces of memory, (P, 2) int64 with addresses and bytes, it gives (P,) int64, which differ where a word of memory does.

A call returns when its results are there, and threads that lost their core may still be inside it: they write where
nobody reads any more, and may read weights, tables and records, and write the call's own keys and values to the cache
again. `program_settle` waits for them: it has to be called before a cache is cropped, reordered or freed, and before a
program or what it points to is freed.
"""

from __future__ import annotations

import atexit

import torch

from .._load import cpu_library

RUN = (
    "program_run(Tensor program, Tensor hidden, Tensor positions, Tensor? starts, Tensor caches, Tensor angles, "
    "Tensor(a!) logits, int past) -> ()"
)
START = (
    "program_start(Tensor program, Tensor hidden, Tensor positions, Tensor? starts, Tensor caches, Tensor angles, "
    "int keep, int past) -> int"
)
ENCODE = (
    "program_encode(Tensor program, Tensor hidden, Tensor sequences, Tensor scores, Tensor angles, Tensor(a!) out, "
    "int most) -> ()"
)
STEP = "program_step(int run) -> int"
READ = "program_read(int run, int value, Tensor(a!) out) -> ()"
WRITE = "program_write(int run, int value, Tensor x) -> ()"
PANEL_BYTES = "program_panel_bytes(Tensor program) -> int"
MAKE_PANELS = "program_make_panels(Tensor(a!) program, Tensor(b!) memory) -> ()"
CHECKSUMS = "program_checksums(Tensor pieces) -> Tensor"
FINISH = "program_finish(int run) -> ()"
SETTLE = "program_settle() -> ()"
SIZES = "program_sizes() -> int[]"  # of the records, for tests
# For tests: threads pause at random, about once in `every` places where they might lose their core, 0 never. Returns
# how many chunks were taken over from other threads, and made again, since the last call.
DELAYS = "program_delays(int every) -> (int, int)"

_SCHEMAS = RUN, ENCODE, START, STEP, READ, WRITE, PANEL_BYTES, MAKE_PANELS, CHECKSUMS, FINISH, SETTLE, SIZES, DELAYS
for schema in _SCHEMAS:
    name, brace, rest = schema.partition("(")
    torch.library.define("bigkernels::" + name, brace + rest)

run = torch.ops.bigkernels.program_run.default
encode = torch.ops.bigkernels.program_encode.default
start = torch.ops.bigkernels.program_start.default
step = torch.ops.bigkernels.program_step.default
read = torch.ops.bigkernels.program_read.default
write = torch.ops.bigkernels.program_write.default
panel_bytes = torch.ops.bigkernels.program_panel_bytes.default
make_panels = torch.ops.bigkernels.program_make_panels.default
checksums = torch.ops.bigkernels.program_checksums.default
finish = torch.ops.bigkernels.program_finish.default
settle = torch.ops.bigkernels.program_settle.default
sizes = torch.ops.bigkernels.program_sizes.default
delays = torch.ops.bigkernels.program_delays.default

if cpu_library().reason is None:
    # What a late thread reads is about to be freed.
    atexit.register(settle)
