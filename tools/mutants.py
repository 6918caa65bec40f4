#!/usr/bin/env python3
"""Which mutants of kernel lines the tests notice.

    python tools/mutants.py                    all of it: hours on two cores; what is known already is not repeated
    python tools/mutants.py --only rope,glu    some operators
    python tools/mutants.py --again            only what survived, after a new test

A mutant is a kernel with one thing wrong: a bound, a stride, a mask, a tail, a sign, an accumulation, a split over
threads. All mutants go into one copy of the sources (build/mutants/tree), each behind a number that is chosen while the
program runs, so that a file is compiled once per instruction-set level and not once per mutant; then each mutant meets
the tests of its operator that reach it, in a process of its own, until one fails. Triton kernels run in the
interpreter.

The sample is the same in every run. It leaves out what decides speed alone (tools/mutation/cpp.py, SPEED_ONLY). The
table goes to tools/mutants.md; reasons for survivors come from tools/mutants_reasons.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

from mutation.mutant import Candidate
from mutation.operators import OPERATORS, RAW
from mutation.table import write_table
from mutation.tree import KEPT, LEVELS, ROOT, TREE, WORK, build, levels_of, sample

RESULTS = WORK / "results.jsonl"
REASONS = ROOT / "tools" / "mutants_reasons.json"  # by a mutant's name: why nothing notices it


def known() -> dict[tuple[str, str], dict]:
    """What became of each mutant at each level: killed if any operator's tests did, and by whose it was tried."""
    found: dict[tuple[str, str], dict] = {}
    if RESULTS.exists():
        for line in RESULTS.read_text().splitlines():
            record = json.loads(line)
            key = record["name"], record["level"]
            before = found.get(key, {"tried": [], "status": "not reached"})
            better = ("not reached", "survived", "killed").index
            best = max((record, before), key=lambda r: better(r["status"]))
            found[key] = best | {"tried": [*before["tried"], record["operator"]]}
    return found


def run(level: str, operators: dict[str, list[Candidate]], texts: dict[str, str], quick: int) -> None:
    """One session of pytest for all operators at a level; its results go to RESULTS as they come."""
    interpreted = level == "interpreter"

    def entry(m: Candidate, mutants: list[Candidate]) -> dict:
        # What reaches a mutant is measured at the first level. For one that is not compiled there, what reaches any
        # mutant of its file stands in.
        elsewhere = not interpreted and LEVELS[-1] not in levels_of(m, texts[m.path])
        stand_ins = [o.number for o in mutants if o.path == m.path] if elsewhere else []
        return {
            "number": m.number,
            "name": m.name,
            "path": m.path,
            "line": m.line,
            "kind": m.kind,
            "stand_ins": stand_ins,
        }

    order = {
        "library": None if interpreted else str(TREE / "bigkernels" / "libbigkernels_cpu.so"),
        "level": level,
        "first": interpreted or level == LEVELS[-1],
        "baselines": str(WORK / ("baseline-interpreter" if interpreted else "baseline-cpu")),
        "results": str(RESULTS),
        "quick": quick,
        "operators": {
            name: {
                "tests": OPERATORS[name].interpreter if interpreted else OPERATORS[name].tests | {RAW: ""},
                "mutants": [entry(m, mutants) for m in mutants],
            }
            for name, mutants in operators.items()
        },
    }
    (WORK / f"order-{level}.json").write_text(json.dumps(order))
    environment = os.environ | {"PYTHONPATH": f"{TREE}{os.pathsep}{TREE / 'tests'}"}
    environment |= {"OMP_WAIT_POLICY": "passive"}  # threads that wait would count as work
    environment |= {"TRITON_INTERPRET": "1"} if interpreted else {"BIGKERNELS_CPU_ISA": level}
    session = ROOT / "tools" / "mutation" / "session.py"
    subprocess.run([sys.executable, session, WORK / f"order-{level}.json"], cwd=TREE, env=environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="operators, by commas (default: all)")
    parser.add_argument("--again", action="store_true", help="try survivors again")
    parser.add_argument(
        "--levels", default=",".join((*reversed(LEVELS), "interpreter")), help="by commas (default: %(default)s)"
    )
    parser.add_argument("--quick", type=int, default=0, help="so many tests of an operator, for a first look")
    parser.add_argument("--built", action="store_true", help="with the tree as it was built last")
    parser.add_argument("--plan", action="store_true", help="print the sample and stop")
    parser.add_argument("--table", action="store_true", help="write the table of what is known and stop")
    options = parser.parse_args()

    mutants, reasons = sample(), json.loads(REASONS.read_text())
    if options.plan:
        for m in mutants:
            print(m.number, m.kind, m.line, m.name)
        return
    texts = {m.path: (ROOT / m.path).read_text() for m in mutants}
    if not options.table:
        WORK.mkdir(parents=True, exist_ok=True)
        if not options.built:
            build(mutants)
        names = set(json.loads(KEPT.read_text()))
        kept = [m for m in mutants if m.name in names]
        print(f"{len(kept)} of {len(mutants)} mutants compile", flush=True)
        for level in options.levels.split(","):
            results = known()

            def wanted(m: Candidate, operator: str, level: str = level, results: dict = results) -> bool:
                if m.path not in OPERATORS[operator].files or level not in levels_of(m, texts[m.path]):
                    return False
                record = results.get((m.name, level))
                # What another operator's tests did not notice, this one's may.
                again = options.again and m.name not in reasons
                return record is None or (record["status"] != "killed" and (again or operator not in record["tried"]))

            chosen = options.only.split(",") if options.only else OPERATORS
            operators = {name: [m for m in kept if wanted(m, name)] for name in chosen}
            if operators := {name: mutants for name, mutants in operators.items() if mutants}:
                run(level, operators, texts, options.quick)
    names = set(json.loads(KEPT.read_text())) & {m.name for m in mutants}
    write_table(
        ROOT, json.loads(REASONS.read_text()), [record for record in known().values() if record["name"] in names]
    )


if __name__ == "__main__":
    main()
