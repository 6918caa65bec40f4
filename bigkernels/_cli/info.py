"""`bigkernels info`."""

from __future__ import annotations

import argparse
import json

from .._info import info
from .._terminal import gigabytes, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the whole dictionary as JSON")


def run(args: argparse.Namespace) -> int:
    facts = info()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    table("Machine", ["what", "value"], _machine(facts))
    libraries = [
        [name, "loaded" if entry["loaded"] else "not loaded", entry["reason"] or entry["path"] or ""]
        for name, entry in facts["libraries"].items()
    ]
    table("Libraries", ["library", "state", "path or reason"], libraries)
    columns = ["operator", "device", "dtypes", "runs on", "others"]
    table(
        "Operators",
        columns,
        [row for op, devices in facts["operators"].items() for row in _implementations(op, devices)],
    )
    table("Step programs", ["what", "value"], _programs(facts["programs"]))
    columns = ["operator", "calls", "capabilities", "computed by", "evidence"]
    table("Routes on GPUs", columns, [_route(row) for row in facts["routes"]])
    return 0


def _programs(found: dict) -> list[list[str]]:
    rows = [
        ["language models decode in", "their modules: " + found["reason"] if found["reason"] else "one native call"]
    ]
    rows += [["memory kept for operators and programs", f"{found['workspaces'] / 1e6:.1f} MB"]]
    for held in found["models"]:
        calls = f"{held['calls']} calls, {held['by modules']} by its modules"
        why = f" ({held['why']})" if held["why"] else ""
        rows.append([held["model"] or "a patched model", f"{held['state']}; {calls}{why}"])
    return rows


def _route(row: dict) -> list[str]:
    since, before = (".".join(map(str, row[end])) for end in ("since", "before"))
    first, last = row["since"] == (0, 0), row["before"] == (99, 0)
    where = (
        "all"
        if first and last
        else f"below {before}"
        if first
        else f"{since} and later"
        if last
        else f"{since} to below {before}"
    )
    return [row["operator"], row["call"], where, row["by"], f"{row['evidence']}: {row['source']}"]


def _machine(found: dict) -> list[list[str]]:
    cpu, memory = found["cpu"], found["memory"]
    rows = [[name, version or "not installed"] for name, version in found["versions"].items()]
    rows += [["CPU", cpu["model"]], ["cores, threads used", f"{cpu['cores']}, {cpu['threads']}"]]
    rows += [["CPU features", " ".join(cpu["features"]) or "none that a kernel uses"]]
    lowered = f" (BIGKERNELS_CPU_ISA={cpu['BIGKERNELS_CPU_ISA']})" if cpu["BIGKERNELS_CPU_ISA"] else ""
    rows += [["ISA level", (cpu["isa"] or "none: no CPU library") + lowered]]
    rows += [
        [f"for ISA level {level}", f"the CPU lacks {' '.join(lacks)}"] for level, lacks in cpu["isa_lacks"].items()
    ]
    if memory:
        rows += [["memory", f"{gigabytes(memory['total'])}, {gigabytes(memory['available'])} available"]]
    for gpu in found["gpus"]:
        rows += [["GPU", f"{gpu['name']}, {gigabytes(gpu['memory'])}, compute capability {gpu['capability']}"]]
    return rows if found["gpus"] else [*rows, ["GPU", "none"]]


def _implementations(operator: str, devices: dict) -> list[list[str]]:
    """One row for each group of dtypes that the same implementations support."""
    rows = []
    for device, dtypes in devices.items():
        groups: dict[tuple, list[str]] = {}
        for dtype, refusals in dtypes.items():
            groups.setdefault(tuple(refusals.items()), []).append(dtype)
        for refusals, names in groups.items():
            first = next(name for name, reason in refusals if reason is None)
            rest = [(name, reason) for name, reason in refusals if name not in (first, "reference")]
            others = "; ".join(f"{name}: {reason or 'supported, too'}" for name, reason in rest)
            rows.append([operator, device, ", ".join(names), first, others])
    return rows
