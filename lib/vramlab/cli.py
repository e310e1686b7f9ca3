"""The command line: each command is a thin caller of the library, and each speaks JSON with
`--json`.

A command returns `Answer`: plain data, the same as text, and the exit code. `main` prints one of
the two, so that with `--json` standard output is exactly one JSON object, of an error too. Its
fields are documented in `outputs/README.md`; `SCHEMA` changes when one of them does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = 1


class Answer(NamedTuple):
    """What a command answers: the fields of its JSON object, the same as text, and the exit
    code."""

    document: dict[str, Any]
    text: str
    code: int = 0


def _regimes(args) -> Answer:
    from .regimes.regime import read_regimes

    rows = read_regimes(args.file) if args.file else read_regimes()
    fields = ("accumulate", "clip", "lr", "says", "source", "differs")
    regimes = {
        name: {**row.axes(), **{field: getattr(row, field) for field in fields}}
        for name, row in rows.items()
    }
    return Answer({"regimes": regimes}, table(rows))


def table(rows: dict) -> str:
    """The regimes-by-axes table in Markdown, as `params/README.md` shows it. An empty cell is the
    axis's default."""
    from .regimes.registry import AXES

    def cell(row, axis: str) -> str:
        fields = {k: v for k, v in row.axes()[axis].items() if k != "value"}
        defaults = AXES[axis][row.values[axis]]()
        changed = [f"{k} {v}" for k, v in fields.items() if getattr(defaults, k) != v]
        if not changed and row.values[axis] == next(iter(AXES[axis])):
            return ""
        return row.values[axis] + (f" ({', '.join(changed)})" if changed else "")

    head = "| regime | " + " | ".join(AXES) + " | what it does to the bytes |"
    lines = [
        f"| `{name}` | "
        + " | ".join(cell(row, axis) for axis in AXES)
        + f" | {row.says} ({row.source}) |"
        for name, row in rows.items()
    ]
    return "\n".join([head, "|---" * (len(AXES) + 2) + "|", *lines])


def _items(args) -> Answer:
    from .factcc.sources import describe_items, item_files, load_items, write_items

    described = describe_items(args.path, source=args.source, stories=args.stories)
    if not described["items"] + described["unlabelled"]:
        first = [
            f"{p['path']}, line {p['line']}: {p['message']}" for p in described["problems"][:1]
        ]
        raise ValueError(": ".join([f"{args.path} has no item of {described['source']}", *first]))
    if args.write and args.write.resolve() in {file.resolve() for file in item_files(args.path)}:
        raise ValueError(
            f"--write {args.write} is a file that the items are read from: give another"
        )
    if args.write:
        write_items(load_items(args.path, args.source, args.stories).items, args.write)
    return Answer(
        described,
        "\n".join(
            f"{key}: {json.dumps(value) if isinstance(value, dict | list) else value}"
            for key, value in described.items()
        ),
    )


def _replay(args) -> Answer:
    from .allocator.replay import replay_file

    outcome = replay_file(args.snapshot, args.device, args.max_mib << 20).as_dict(args.tolerance)
    words = "\n".join(
        value if key == "verdict" else f"{key}: {json.dumps(value)}"
        for key, value in outcome.items()
    )
    return Answer(outcome, words, 0 if outcome["agrees"] else 1)


def _sweep(args) -> Answer:
    from .runs import sweep

    swept = sweep.sweep(args.path, args.out, args.force, args.retry, args.dry_run, quiet=args.json)
    report = Answer({}, "")
    if not (args.dry_run or args.no_report) and any(row["outcome"] != "due" for row in swept.rows):
        of_sweep = args.path.with_name(f"atlas-{args.path.name}")
        if of_sweep.exists() and not args.no_forecast and swept.code != 130:
            _chart(of_sweep, swept.folder, quiet=args.json)
        report = _build(swept.folder)
    return Answer(
        {"folder": str(swept.folder), "cells": swept.rows, **report.document},
        f"{sweep.to_text(swept.rows)}\n{report.text}".strip(),
        swept.code,
    )


def _chart(path: Path, folder: Path, quiet: bool) -> dict:
    """The atlas of `path`, written into `folder` for the report."""
    from .files import write_checked
    from .forecast import kept_answers

    content = kept_answers.chart(path, progress=not quiet)
    folder.mkdir(parents=True, exist_ok=True)
    write_checked(folder / "forecast.json", content)
    return content


def _atlas(args) -> Answer:
    from .forecast import chart_table

    if args.dry_run:
        from .forecast.chart import kept, read_atlas

        atlas = read_atlas(args.path)
        fields = ("model", "name", "seq", "batch")
        cells = [
            {**{field: getattr(question, field) for field in fields}, "kept": kept(atlas, question)}
            for question in atlas.questions()
        ]
        lines = [
            f"{'kept' if cell['kept'] else 'due':<5}{cell['model']}  {cell['name']}  "
            f"{cell['batch']} x {cell['seq']}"
            for cell in cells
        ]
        return Answer({"cells": cells}, "\n".join(lines))
    content = _chart(args.path, args.out or Path("outputs") / args.path.stem, quiet=args.json)
    failed = any(cell["reason"] for cell in (*content["cells"], *content.get("worlds", ())))
    cells = chart_table.table(content).to_dict("records")
    return Answer({"cells": cells}, chart_table.to_text(content), int(failed))


def _report(args) -> Answer:
    return _build(args.folder)


def _build(folder: Path) -> Answer:
    from .report import build

    left_out: list[str] = []
    path = build(folder, left_out)
    size = path.stat().st_size
    return Answer(
        {"report": str(path), "size_bytes": size, "left_out": left_out},
        "\n".join([f"{path}  {size / 1e6:.2f} MB", *left_out]),
    )


def _studies(args) -> Answer:
    from .studies import run_all

    studies = run_all.run(
        args.study, args.out, args.gallery, args.jobs, args.dry_run, quiet=args.json
    )
    failed = any(study.get("reason") for study in studies)
    return Answer({"studies": studies}, run_all.to_text(studies), int(failed))


def _predict(args) -> Answer:
    from .forecast.kept_answers import predict

    names = ("model", "regime", "seq", "batch", "weights", "world", "card", "allocator")
    options = {**{name: getattr(args, name) for name in names}, "axis": args.max}
    report = (lambda _: None) if args.json else (lambda text: print(text, file=sys.stderr))
    answer = predict(options, report)
    return Answer(answer["document"], answer["text"])


def _base(args) -> Answer:
    from .factcc.base import record as base_record

    if args.seed is not None and not args.make:
        raise ValueError("--seed goes with --make, which trains a base of that seed")
    if args.make:
        described = base_record.make(args.model, args.recipe, args.seed, progress=not args.json)
    else:
        described = base_record.describe(args.model, args.recipe)
    return Answer(described, base_record.to_text(described))


def _doctor(args) -> Answer:
    from .runs import machine_report as doctor

    findings = doctor.examine()
    return Answer(doctor.to_json(findings), doctor.to_text(findings))


class _JsonParser(argparse.ArgumentParser):
    """Prints the one JSON document of an error of use too."""

    def error(self, message: str):
        print(json.dumps({"schema": SCHEMA, "error": message}))
        super().error(message)


def parser(as_json: bool = False) -> argparse.ArgumentParser:
    """All commands with their options. `as_json`: errors of use are a JSON document too."""
    kind = _JsonParser if as_json else argparse.ArgumentParser
    top = kind(
        prog="vramlab",
        description=(
            "Which memory regime fine-tunes Baichuan-2 on the GPU at hand, "
            "and what it costs in factual consistency."
        ),
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], Answer], about: str):
        sub = commands.add_parser(name, help=about, description=about)
        sub.add_argument(
            "--json", action="store_true", help="print one JSON document instead of text"
        )
        sub.set_defaults(function=function)
        return sub

    sub = command("regimes", _regimes, "The rows of params/regimes.yml, with their axes.")
    sub.add_argument("--file", type=Path, help="another file of rows")
    sub = command(
        "items",
        _items,
        "What a FactCC, SummEdits, BoolQ or generated data set holds: counts, labels, problems.",
    )
    sub.add_argument("path", type=Path)
    sub.add_argument(
        "--source",
        choices=("factcc", "boolq", "summedits", "generated"),
        help="default: found from the content",
    )
    sub.add_argument(
        "--stories",
        type=Path,
        help="folder with CNN/DM .story files, for FactCC releases without articles",
    )
    sub.add_argument(
        "--write",
        type=Path,
        help="a .jsonl file to write the items to, their articles included, as a run reads them",
    )
    sub = command(
        "replay",
        _replay,
        "The allocator simulator against a recorded CUDA snapshot, event by event.",
    )
    sub.add_argument(
        "snapshot",
        type=Path,
        help="a pickle of torch.cuda.memory._dump_snapshot; none of it is run",
    )
    sub.add_argument("--device", type=int, help="default: the only device with events")
    sub.add_argument(
        "--max-mib", type=int, default=1024, help="largest file that is read (default: 1024 MiB)"
    )
    sub.add_argument(
        "--tolerance",
        type=float,
        default=0.01,
        help=(
            "relative error of peak reserved bytes and of bytes allocated at the end that still"
            " counts as agreement (default: 0.01); beyond it the exit code is 1"
        ),
    )
    sub = command(
        "sweep", _sweep, "Every cell of a sweep through papermill, resumable, then the report."
    )
    sub.add_argument("path", type=Path, help="for example params/quick.yml")
    sub.add_argument("--out", type=Path, help="default: outputs/<name of the sweep>")
    sub.add_argument("--force", action="store_true", help="run finished cells again")
    sub.add_argument(
        "--retry",
        choices=("failed", "oom", "diverged", "all"),
        help="run again the cells that ended so",
    )
    sub.add_argument("--dry-run", action="store_true", help="list the cells and what would run")
    sub.add_argument("--no-report", action="store_true")
    sub.add_argument(
        "--no-forecast",
        action="store_true",
        help="leave out the atlas beside the sweep, params/atlas-<sweep>.yml",
    )
    sub = command(
        "predict",
        _predict,
        "The real training step of a model on a virtual GPU: every byte, and whether it fits.",
    )
    sub.add_argument(
        "--model", default="baichuan2-7b", help="a file of params/models, or the path of one"
    )
    sub.add_argument("--regime", default="full", help="a row of params/regimes.yml")
    sub.add_argument("--seq", type=int, default=1024, help="tokens a row")
    sub.add_argument("--batch", type=int, default=1, help="rows a micro-batch")
    sub.add_argument(
        "--weights",
        choices=("fp32", "mixed", "bf16", "bf16_sr", "master"),
        help="another storage type than the row's own",
    )
    sub.add_argument(
        "--world", type=int, default=1, help="ranks of a sharded regime; the forecast is one rank's"
    )
    sub.add_argument("--card", help="a card of params/cards.yml, for example rtx4090")
    sub.add_argument(
        "--allocator",
        metavar="CONF",
        help="as in PYTORCH_ALLOC_CONF, for example expandable_segments:True",
    )
    sub.add_argument(
        "--max", choices=("seq", "batch"), help="search the largest that fits on the card"
    )
    sub = command(
        "atlas",
        _atlas,
        "Every regime against every card, predicted; kept, so that it goes on where it was"
        " stopped.",
    )
    sub.add_argument(
        "path",
        type=Path,
        nargs="?",
        default=Path("params/atlas.yml"),
        help="default: params/atlas.yml",
    )
    sub.add_argument(
        "--out", type=Path, help="folder for forecast.json (default: outputs/<name of the atlas>)"
    )
    sub.add_argument(
        "--dry-run", action="store_true", help="list the cells and what would be traced"
    )
    sub = command(
        "studies",
        _studies,
        "The studies of the source papers: their runs, their notebooks, verdicts on their claims.",
    )
    sub.add_argument(
        "study", nargs="*", help="a study or a file of params/studies (default: all five, small)"
    )
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("outputs/studies"),
        help="folder for runs (default: outputs/studies)",
    )
    sub.add_argument(
        "--gallery", type=Path, help="folder for the thinned records, for example outputs/gallery"
    )
    sub.add_argument("--jobs", type=int, default=0, help="cells side by side (default: one a core)")
    sub.add_argument("--dry-run", action="store_true", help="count the cells and what would run")
    sub = command(
        "base",
        _base,
        "The base model that runs start from: its recipe, scores and seeds; or trains it again.",
    )
    sub.add_argument(
        "--model",
        default="tiny",
        help="a file of params/models, or the path of one (default: tiny)",
    )
    sub.add_argument(
        "--recipe", default="standard", choices=("standard", "reading"), help="default: standard"
    )
    sub.add_argument(
        "--make",
        action="store_true",
        help="train it again, some five minutes; it then ships in place of the old",
    )
    sub.add_argument(
        "--seed",
        type=int,
        help="with --make: another seed, which adds a row to the table and ships nothing",
    )
    command("doctor", _doctor, "What this machine can measure, what it cannot, and why.")
    sub = command("report", _report, "One self-contained HTML file from a folder of finished runs.")
    sub.add_argument("folder", type=Path, help="for example outputs/quick")
    return top


def main(argv: list[str] | None = None) -> int:
    """Entry point. Errors of use go to standard error in one line, exit code 2."""
    args = parser("--json" in (sys.argv if argv is None else argv)).parse_args(argv)
    answer = _answer(args)
    document = {"schema": SCHEMA, **answer.document}
    text = json.dumps(_plain(document), indent=1) if args.json else answer.text
    try:
        print(text, end="\n" if text else "", flush=True)
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return answer.code


def _answer(args) -> Answer:
    """The command's answer. An error of use or of the file system is a line on standard error and
    code 2."""
    try:
        return args.function(args)
    except KeyboardInterrupt:
        return Answer({"error": "interrupted"}, "", 130)
    except (ValueError, OSError) as error:
        message = (
            f"{error.filename}: {error.strerror}"
            if isinstance(error, OSError) and error.filename
            else str(error)
        )
        print(f"vramlab {args.command}: {message}", file=sys.stderr)
        return Answer({"error": message}, "", 2)


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
