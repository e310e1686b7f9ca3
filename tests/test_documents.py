"""What the README files say is what the library does: commands parse, examples are read, tables are
computed."""

import re
import shlex

import pytest
import yaml

from vramlab import cli
from vramlab.cards import card, read_cards
from vramlab.files import ROOT
from vramlab.forecast.chart import read_atlas
from vramlab.forecast.forecast import Question, forecast
from vramlab.regimes.parameters import model_spec
from vramlab.regimes.regime import read_row
from vramlab.runs.parameters import KNOWN_PARAMETERS
from vramlab.runs.sweep import read_sweep
from vramlab.studies.claims import read_claims

DOCUMENTS = [
    ROOT / name
    for name in (
        "README.md",
        "lib/README.md",
        "params/README.md",
        "notebooks/README.md",
        "outputs/README.md",
        "tests/benchmarks/README.md",
    )
]
TEXT = {str(path.relative_to(ROOT)): path.read_text() for path in DOCUMENTS}
LINES = [
    (name, line.strip())
    for name, text in TEXT.items()
    for line in text.splitlines()
    if line.startswith("    ")
]


def _between(name: str, mark: str) -> list[list[str]]:
    """The cells of a Markdown table between two marks, its heading left out."""
    table = TEXT[name].split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0]
    rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_front_page_is_short():
    assert len(TEXT["README.md"].splitlines()) <= 120


@pytest.mark.parametrize(("name", "line"), LINES, ids=[line[:60] for _, line in LINES])
def test_a_printed_command_is_one_that_the_program_takes(name, line):
    words = shlex.split(line, comments=True)
    if words and words[0].endswith("vramlab"):
        cli.parser().parse_args(words[1:])
    elif words and words[0].endswith("papermill"):
        notebook = (ROOT / words[1]).read_text()
        assert words[2] == "out.ipynb"
        assert all(
            f"{words[at + 1]}: " in notebook for at, word in enumerate(words) if word == "-p"
        )
    elif words and words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert all(word in targets or "=" in word for word in words[1:])


@pytest.mark.parametrize(("name", "text"), TEXT.items(), ids=TEXT)
def test_files_that_are_named_are_there(name, text):
    folder = (ROOT / name).parent
    targets = re.findall(r"\]\(([^)#:]+)\)", text)
    assert [target for target in targets if not (folder / target).exists()] == []
    named = re.findall(
        r"`((?:params|notebooks|lib|tests|outputs/(?:reference|gallery))/[\w./-]+)`", text
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_reading_path_is_short():
    files = [
        ROOT / "lib" / "vramlab" / row[0].strip("`") for row in _between("lib/README.md", "path")
    ]
    assert 0 < len(files) <= 30
    assert sum(len(path.read_text().splitlines()) for path in files) <= 3800


def test_every_parameter_of_a_run_is_described_with_its_default():
    rows = {
        row[0].strip("`"): row[1].strip("`") for row in _between("params/README.md", "parameters")
    }
    written = {key: yaml.safe_load(value) for key, value in rows.items() if value != "empty"}
    assert rows.keys() == KNOWN_PARAMETERS.keys()
    assert {**dict.fromkeys(rows, ""), **written} == KNOWN_PARAMETERS


def test_every_example_of_a_file_is_read(tmp_path):
    text = TEXT["params/README.md"]
    examples = dict(re.findall(r"^## [^\n]*?`([\w*/.]+)`\n.*?```yaml\n(.*?)```", text, re.M | re.S))
    paths = {}
    for name, example in examples.items():
        paths[name] = tmp_path / name.replace("/*", "").replace("/", "-")
        paths[name].write_text(example)
    assert set(examples) == {
        "regimes.yml",
        "models/*.yml",
        "cards.yml",
        "quick.yml",
        "atlas.yml",
        "studies/*.yml",
        "claims.yml",
    }
    for regime, row in yaml.safe_load(examples["regimes.yml"]).items():
        assert read_row(regime, row).values["until"] == "backward"
    assert model_spec(str(paths["models/*.yml"])).fingerprint() == (
        model_spec("baichuan2-7b").fingerprint()
    )
    assert read_cards(paths["cards.yml"])["rtx4090"].total_gib == card("rtx4090").total_gib
    assert len(read_sweep(paths["quick.yml"], tmp_path / "out")[2]) == 6
    assert read_atlas(paths["atlas.yml"]).questions()
    assert read_claims(paths["claims.yml"])[0].study == "checkpointing"


@pytest.mark.slow
@pytest.mark.parametrize("row", _between("README.md", "answer"), ids=lambda row: row[0])
def test_the_answer_on_the_front_page_is_the_forecasts(row):
    regime, weights, peak_gib, *verdicts, _ = [cell.strip("`") for cell in row]
    for key, verdict in zip(("rtx4090", "l40s", "h100"), verdicts, strict=True):
        question = Question("baichuan2-7b", regime, 1024, 1, "" if weights == "own" else weights)
        predicted = forecast(question, card(key))
        margin_gib = f"{predicted.margin_bytes / 2**30:+.1f}"
        assert verdict == (margin_gib if predicted.fits else "no")
        if key == "rtx4090":  # another card's cuBLAS takes another workspace
            assert peak_gib == f"{predicted.allocated_peak_bytes / 2**30:.1f}"
