"""Measure every topic, print one table, and write docs/benchmarks.md and docs/benchmarks.json.

    python -m benchmarks                            # all topics at full size (make bench)
    python -m benchmarks --only decoder memory      # some topics; the results of the others stay
    python -m benchmarks --quick                    # small sizes, printed; written only with --out FOLDER
    python -m benchmarks --only --gpu-rows FILE     # no measurement; the GPU rows of another machine's JSON

Each topic runs in a fresh process, without the threads, caches or memory of another, and its results are written before
the next topic starts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from pathlib import Path

from benchmarks.report import Report, table
from benchmarks.topics import EXTRAS, TOPICS, measure_alone
from setpred.errors import InputError

DOCS = Path(__file__).resolve().parents[1] / "docs"


def measured(topics: list[str], report: Report, *, quick: bool) -> list[str]:
    """Measure each topic and write the report after it; return the topics that failed."""
    failed = []
    for topic in topics:
        start = time.perf_counter()
        print(f"{topic} ...", end=" ", file=sys.stderr, flush=True)
        try:
            report.add(topic, measure_alone(topic, quick))
        except (Exception, SystemExit):  # one failure must not lose an hour of results
            traceback.print_exc()
            failed.append(topic)
        else:
            report.write()
        print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return failed


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    topics = [*TOPICS, *EXTRAS]
    parser.add_argument("--quick", action="store_true", help="small sizes; docs/ stays as it is")
    parser.add_argument("--only", nargs="*", choices=topics, metavar="TOPIC", help=", ".join(topics))
    parser.add_argument("--out", type=Path, help="folder of benchmarks.md and benchmarks.json (default: docs)")
    parser.add_argument("--gpu-rows", type=Path, metavar="FILE", help="a benchmarks.json of a machine with a GPU")
    return parser.parse_args(arguments)


def run(folder: Path, options: argparse.Namespace) -> int:
    topics = [topic for topic in (*TOPICS, *EXTRAS) if options.only is None or topic in options.only]
    report = Report(folder, afresh=options.only is None)
    if options.gpu_rows is not None:
        report.add_gpu(options.gpu_rows)
    failed = measured(topics, report, quick=options.quick)
    report.write()
    print(table(report.content["rows"]))
    for name, module in EXTRAS.items():
        if name in report.content:
            print(module.markdown(report.content[name]) + "\n")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    try:
        if options.quick and options.out is None:
            with tempfile.TemporaryDirectory() as folder:
                return run(Path(folder), options)
        return run(options.out or DOCS, options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
