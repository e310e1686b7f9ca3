"""The command line: each command is a thin caller of the library, and each speaks JSON with `--json`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import yaml


def _regimes(args) -> int:
    from .regime import read_regimes

    rows = read_regimes(args.file) if args.file else read_regimes()
    if args.json:
        print(json.dumps({name: {**row.axes(), "accumulate": row.accumulate, "clip": row.clip, "lr": row.lr,
                                 "says": row.says, "source": row.source, "differs": row.differs}
                          for name, row in rows.items()}, indent=1))
    else:
        print(table(rows))
    return 0


def table(rows: dict) -> str:
    """The regimes-by-axes table in Markdown, as the README shows it. A cell left empty is the axis's default."""
    from .axes import AXES

    def cell(row, axis: str) -> str:
        fields = {k: v for k, v in row.axes()[axis].items() if k != "value"}
        defaults = AXES[axis][row.values[axis]]()
        told = [f"{k} {v}" for k, v in fields.items() if getattr(defaults, k) != v]
        if not told and row.values[axis] == next(iter(AXES[axis])):
            return ""
        return row.values[axis] + (f" ({', '.join(told)})" if told else "")

    head = "| regime | " + " | ".join(AXES) + " | what it does to the bytes |"
    lines = [f"| `{name}` | " + " | ".join(cell(row, axis) for axis in AXES) + f" | {row.says} ({row.source}) |"
             for name, row in rows.items()]
    return "\n".join([head, "|---" * (len(AXES) + 2) + "|", *lines])


def _items(args) -> int:
    from .factcc.sources import describe_items, load_items, write_items

    described = describe_items(args.path, source=args.source, stories=args.stories)
    if args.write:
        write_items(load_items(args.path, args.source, args.stories).items, args.write)
    if args.json:
        print(json.dumps(described, indent=1))
    else:
        for key, value in described.items():
            print(f"{key}: {json.dumps(value) if isinstance(value, dict | list) else value}")
    return 0


def _replay(args) -> int:
    from .memory.replay import replay_file

    outcome = replay_file(args.snapshot, args.device, args.max_mib << 20).as_dict(args.tolerance)
    if args.json:
        print(json.dumps(outcome, indent=1))
    else:
        print("\n".join(value if key == "verdict" else f"{key}: {json.dumps(value)}" for key, value in outcome.items()))
    return 0 if outcome["agrees"] else 1


def _sweep(args) -> int:
    from .report import build
    from .sweep import sweep

    code = sweep(args.path, out=args.out, force=args.force, retry=args.retry, dry_run=args.dry_run, json=args.json)
    if not (args.dry_run or args.no_report):
        folder = Path(args.out) if args.out else Path("outputs") / Path(args.path).stem
        of_sweep = Path(args.path).with_name(f"atlas-{Path(args.path).name}")
        if of_sweep.exists() and not args.no_forecast and code != 130:
            _chart(of_sweep, folder, quiet=args.json)
        _say_report(build(folder), args.json)
    return code


def _chart(path: Path, folder: Path, quiet: bool) -> dict:
    """The atlas of `path`, written into `folder` for the report."""
    from . import charted
    from .files import write_whole

    content = charted.recall(path)
    if content is None:
        from .atlas import chart, read_atlas
        from .worlds import chart_worlds

        asked = read_atlas(path)
        content = chart(asked, progress=not quiet)
        if asked.worlds:
            content["worlds"] = chart_worlds(asked, progress=not quiet)
        charted.remember(path, content)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "forecast.json", json.dumps(content, separators=(",", ":")))
    return content


def _atlas(args) -> int:
    from . import charted

    if args.dry_run:
        from . import atlas

        asked = atlas.read_atlas(args.path)
        cells = [{"model": q.model, "name": q.name, "seq": q.seq, "batch": q.batch, "kept": atlas.kept(asked, q)}
                 for q in asked.questions()]
        lines = (f"{'kept' if c['kept'] else 'due':<5}{c['model']}  {c['name']}  {c['batch']} x {c['seq']}" for c in cells)
        print(json.dumps(cells, indent=1) if args.json else "\n".join(lines))
        return 0
    content = _chart(args.path, args.out or Path("outputs") / args.path.stem, quiet=args.json)
    print(charted.table(content).to_json(orient="records", indent=1) if args.json else charted.words(content))
    return 1 if any(cell["reason"] for cell in (*content["cells"], *content.get("worlds", ()))) else 0


def _report(args) -> int:
    from .report import build

    _say_report(build(Path(args.folder)), args.json)
    return 0


def _studies(args) -> int:
    from .studies import batch

    found = batch.run(args.study, args.out, args.gallery, args.jobs, args.dry_run, quiet=args.json)
    print(json.dumps(found, indent=1) if args.json else batch.words(found))
    return 1 if any(study.get("reason") for study in found) else 0


def _predict(args) -> int:
    from .cards import card
    from .memory.settings import Settings
    from .predict import Question, forecast, largest

    question = Question(args.model, args.regime, args.seq, args.batch, args.weights or "", world=args.world)
    held, settings = args.card and card(args.card), Settings.parse(args.allocator or "")
    if args.max:
        if held is None:
            raise ValueError("--max searches what fits on a card: say which with --card")
        say = (lambda _: None) if args.json else (lambda words: print(words, file=sys.stderr))
        value, found = largest(question, args.max, held, settings, said=say)
        answer = {"max": args.max, "value": value, "forecast": found and found.to_json()}
        print(json.dumps(answer, indent=1) if args.json else f"largest {args.max} that fits on {held.name}: {value}")
        return 0
    found = forecast(question, held, settings)
    answer = {**found.to_json(), "reserved_range_bytes": found.reserved_range_bytes}
    print(json.dumps(answer, indent=1) if args.json else found.words())
    return 0


def _base(args) -> int:
    from . import base_record

    if args.make:
        described = base_record.make(args.model, args.recipe, args.seed, progress=not args.json)
    else:
        described = base_record.describe(args.model, args.recipe)
    print(json.dumps(described, indent=1) if args.json else base_record.to_text(described))
    return 0


def _doctor(args) -> int:
    from . import doctor

    found = doctor.examine()
    print(json.dumps(doctor.to_json(found), indent=1) if args.json else doctor.words(found))
    return 0


def _say_report(path: Path, as_json: bool) -> None:
    size = path.stat().st_size
    if as_json:
        print(json.dumps({"report": str(path), "size_bytes": size}))
    else:
        print(f"{path}  {size / 1e6:.2f} MB")


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    top = argparse.ArgumentParser(prog="vramlab", description="Which memory regime fine-tunes Baichuan-2 on the GPU at hand, "
                                  "and what it costs in factual consistency.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, does, about: str):
        sub = commands.add_parser(name, help=about, description=about)
        sub.add_argument("--json", action="store_true", help="print one JSON document instead of text")
        sub.set_defaults(does=does)
        return sub

    sub = command("regimes", _regimes, "The rows of params/regimes.yml, with their axes.")
    sub.add_argument("--file", type=Path, help="another file of rows")
    sub = command("items", _items, "What a FactCC, SummEdits, BoolQ or generated data set holds: counts, labels, problems.")
    sub.add_argument("path", type=Path)
    sub.add_argument("--source", choices=("factcc", "boolq", "summedits", "generated"), help="default: found from the content")
    sub.add_argument("--stories", type=Path, help="folder with CNN/DM .story files, for FactCC releases without articles")
    sub.add_argument("--write", type=Path, help="a .jsonl file to write the items to, their articles included, as a run reads them")
    sub = command("replay", _replay, "The allocator simulator against a recorded CUDA snapshot, event by event.")
    sub.add_argument("snapshot", type=Path, help="a pickle of torch.cuda.memory._dump_snapshot; none of it is run")
    sub.add_argument("--device", type=int, help="default: the only device with events")
    sub.add_argument("--max-mib", type=int, default=1024, help="largest file that is read (default: 1024 MiB)")
    sub.add_argument("--tolerance", type=float, default=0.01, help="relative error of peak reserved bytes and of bytes allocated "
                     "at the end that still counts as agreement (default: 0.01); beyond it the exit code is 1")
    sub = command("sweep", _sweep, "Every cell of a sweep through papermill, resumable, then the report.")
    sub.add_argument("path", type=Path, help="for example params/quick.yml")
    sub.add_argument("--out", type=Path, help="default: outputs/<name of the sweep>")
    sub.add_argument("--force", action="store_true", help="run finished cells again")
    sub.add_argument("--retry", choices=("failed", "oom", "diverged", "all"), help="run again the cells that ended so")
    sub.add_argument("--dry-run", action="store_true", help="list the cells and what would run")
    sub.add_argument("--no-report", action="store_true")
    sub.add_argument("--no-forecast", action="store_true", help="leave out the atlas beside the sweep, params/atlas-<sweep>.yml")
    sub = command("predict", _predict, "The real training step of a model on a virtual GPU: every byte, and whether it fits.")
    sub.add_argument("--model", default="baichuan2-7b", help="a file of params/models, or the path of one")
    sub.add_argument("--regime", default="full", help="a row of params/regimes.yml")
    sub.add_argument("--seq", type=int, default=1024, help="tokens a row")
    sub.add_argument("--batch", type=int, default=1, help="rows a micro-batch")
    sub.add_argument("--weights", choices=("fp32", "mixed", "bf16", "bf16_sr", "master"),
                     help="another storage type than the row's own")
    sub.add_argument("--world", type=int, default=1, help="ranks of a sharded regime; the forecast is one rank's")
    sub.add_argument("--card", help="a card of params/cards.yml, for example rtx4090")
    sub.add_argument("--allocator", metavar="CONF", help="as in PYTORCH_ALLOC_CONF, for example expandable_segments:True")
    sub.add_argument("--max", choices=("seq", "batch"), help="search the largest that fits on the card")
    sub = command("atlas", _atlas, "Every regime against every card, predicted; kept, so that it goes on where it was stopped.")
    sub.add_argument("path", type=Path, nargs="?", default=Path("params/atlas.yml"), help="default: params/atlas.yml")
    sub.add_argument("--out", type=Path, help="folder for forecast.json (default: outputs/<name of the atlas>)")
    sub.add_argument("--dry-run", action="store_true", help="list the cells and what would be traced")
    sub = command("studies", _studies, "The studies of the source papers: their runs, their notebooks, verdicts on their claims.")
    sub.add_argument("study", nargs="*", help="a study or a file of params/studies (default: all five, small)")
    sub.add_argument("--out", type=Path, default=Path("outputs/studies"), help="folder for runs (default: outputs/studies)")
    sub.add_argument("--gallery", type=Path, help="folder for the thinned records, for example outputs/gallery")
    sub.add_argument("--jobs", type=int, default=0, help="cells side by side (default: one a core)")
    sub.add_argument("--dry-run", action="store_true", help="count the cells and what would run")
    sub = command("base", _base, "The base model that runs start from: its recipe, scores and seeds; or trains it again.")
    sub.add_argument("--model", default="tiny", help="a file of params/models, or the path of one (default: tiny)")
    sub.add_argument("--recipe", default="standard", choices=("standard", "reading"), help="default: standard")
    sub.add_argument("--make", action="store_true", help="train it again, some five minutes; it then ships in place of the old")
    sub.add_argument("--seed", type=int, help="with --make: another seed, which adds a row to the table and ships nothing")
    command("doctor", _doctor, "What this machine can measure, what it cannot, and why.")
    sub = command("report", _report, "One self-contained HTML file from a folder of finished runs.")
    sub.add_argument("folder", type=Path, help="for example outputs/quick")
    return top


def main(argv: list[str] | None = None) -> int:
    """Entry point. Errors of use go to standard error in one line, exit code 2."""
    args = parser().parse_args(argv)
    try:
        code = args.does(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads has had enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, FileNotFoundError, yaml.YAMLError) as error:
        print(f"vramlab {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
