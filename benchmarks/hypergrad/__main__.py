"""Cost, memory and error of hypergradients, of this library and of its peers.

python -m benchmarks.hypergrad --setup      # once: environments of the peers
python -m benchmarks.hypergrad              # all problems; writes benchmarks/results/hypergrad.md
python -m benchmarks.hypergrad --quick      # eager methods of what is installed, few repeats
python -m benchmarks.hypergrad --problems P3,P2-sgd --peers none
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.hypergrad import problems, scaling
from benchmarks.hypergrad.environments import (
    PEERS,
    ROOT,
    Environment,
    cache_folder,
    environment,
    set_up,
)
from benchmarks.hypergrad.reference import reference
from benchmarks.hypergrad.store import Entry, Store
from benchmarks.hypergrad.table import problem_table, render
from benchmarks.hypergrad.worker import Job, Row, load

TIMEOUT = 900


def main(arguments: list[str]) -> None:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    cache: Path = options.cache.expanduser()
    if options.setup is not None:
        for name in _names(options.setup, PEERS, "--setup"):
            set_up(load(name), cache)
        return
    names = _names(options.problems, [*problems.NAMES, "scaling"], "--problems")
    peers = [] if options.peers == "none" else _names(options.peers, PEERS, "--peers")
    repeats = options.repeats or (3 if options.quick else 7)
    sources = {"hypertorch": options.hypertorch} if options.hypertorch else {}
    found = {name: environment(name, cache, sources) for name in ["ours", *peers]}
    if options.quick:
        found = {k: e for k, e in found.items() if e.python in ("", sys.executable)}
    absent = {k: f"{load(k).title}: {e.missing}" for k, e in found.items() if e.missing}
    ready = {k: e for k, e in found.items() if not e.missing}

    output = options.output
    if output is None and not (options.quick or options.steps):
        output = ROOT / "benchmarks" / "results" / "hypergrad.md"
    store = Store(output and output.with_suffix(".json"))
    for name in names:
        started = time.perf_counter()
        if name == "scaling":
            store.put_scaling(_measured_scaling(ready["ours"], min(repeats, 5)))
        else:
            _measure(name, ready, options, repeats, cache, store)
        seconds = time.perf_counter() - started
        print(f"\n{_table(name, store, options.steps, cache)}\n\n[{seconds:.0f} s]", flush=True)
    if output is not None:
        known = [name for name in [*problems.NAMES, "scaling"] if name in store.content]
        measured = {library for name in known for library in store.content[name]}
        missing = [reason for library, reason in absent.items() if library not in measured]
        tables = [_table(name, store, options.steps, cache) for name in known]
        output.write_text(render(tables, missing))
    print("\n".join(f"Not measured: {reason}" for reason in absent.values()))


def _measure(
    name: str,
    ready: dict[str, Environment],
    options: argparse.Namespace,
    repeats: int,
    cache: Path,
    store: Store,
) -> None:
    reference(name, options.steps, cache)
    for library, where in ready.items():
        job = Job(
            library=library,
            problem=name,
            repeats=repeats,
            steps=options.steps,
            compiled=not (options.quick or options.eager),
            memory=not options.quick,
            cache=str(cache),
        )
        before = os.getloadavg()[0]
        rows = _run(job, where)
        loads = sorted((before, os.getloadavg()[0]))
        if rows:
            store.put(name, library, Entry(rows, repeats, (loads[0], loads[1])))


def _table(name: str, store: Store, steps: int | None, cache: Path) -> str:
    if name == "scaling":
        return scaling.table(store.scaling or {})
    known = reference(name, steps, cache)
    title = problems.make(name, torch.float32, steps, known["params"]).title
    entries = {
        "**ours**" if library == "ours" else load(library).title: entry
        for library, entry in store.entries(name, ["ours", *PEERS]).items()
    }
    return problem_table(f"{name}: {title}", entries, known.get("check"))


def _run(job: Job, where: Environment) -> list[Row]:
    """Run a worker; what goes wrong in it is a row too."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        # -P: the working folder would come before the peers that are named hypergrad too.
        module = [where.python, "-P", "-m", "benchmarks.hypergrad.worker"]
        worker = [*module, json.dumps(asdict(job))]
        # A compile cache of its own: the first call of a compiled method shall be a cold one.
        variables = {**where.variables(), "TORCHINDUCTOR_CACHE_DIR": folder}
        try:
            done = subprocess.run(
                [*worker, answer],
                env=variables,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            return [Row("all", failure=f"took more than {TIMEOUT} s")]
        sys.stderr.write(done.stderr)
        if not answer.exists():
            last = done.stderr.strip().splitlines()[-1:] or [f"ended with {done.returncode}"]
            return [Row("all", failure=last[0])]
        return [Row(**row) for row in json.loads(answer.read_text())]


def _measured_scaling(where: Environment, repeats: int) -> dict[str, list[float]]:
    done = subprocess.run(
        [where.python, "-m", "benchmarks.hypergrad.scaling", str(repeats)],
        env=where.variables(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    times: dict[str, list[float]] = json.loads(done.stdout)
    return times


def _names(text: str, known: list[str], option: str) -> list[str]:
    """Split a list of names.

    Raises:
        SystemExit: an unknown name.
    """
    if text == "all":
        return known
    names = text.split(",")
    unknown = [n for n in names if n not in known]
    if unknown:
        raise SystemExit(f"{option}: {unknown[0]!r} is not one of {', '.join(known)}.")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hypergrad",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--problems", default="all", help=f"{', '.join(problems.NAMES)}, scaling")
    add("--peers", default="all", help=f"none, or some of {', '.join(PEERS)}")
    add("--repeats", type=int, help="timed repeats (7; with --quick 3)")
    add("--steps", type=int, help="replaces the number of optimizer or CG steps")
    add("--quick", action="store_true", help="no compiling, memory or environments of peers")
    add("--eager", action="store_true", help="leave out methods that compile")
    add("--setup", nargs="?", const="all", help="create the environments of the peers, or of some")
    add("--hypertorch", type=Path, help="a clone of prolearner/hypertorch (not on PyPI)")
    add("--cache", type=Path, default=cache_folder(), help="references and environments")
    page = "benchmarks/results/hypergrad.md; none with --quick or --steps"
    add("--output", type=Path, help=f"where the page and its JSON file go ({page})")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
