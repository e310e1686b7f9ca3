"""What a notebook's cells call, without a notebook; and what a process says of where it runs."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest
import torch

from vramlab import machine as environment
from vramlab import processes as children
from vramlab.regimes import sharded
from vramlab.report import notebook
from vramlab.runs import machine_report as doctor

GIB = 2**30


def test_parameters_are_the_known_names_and_an_injected_typo_is_refused():
    known = ("regime", "seed", "model")
    cells = [
        "regime = 'full'",
        "  # Parameters\nseed = 3\nother.x = 1\nprint(1)",
        "# Parameters\nlate = 1",
    ]
    assert notebook.parameters({"In": cells, "regime": "full", "seed": 3, "more": 1}, known) == {
        "regime": "full",
        "seed": 3,
    }
    assert (
        notebook._injected(cells) == ["seed"]
        and notebook._injected(["a = 1", "x # Parameters\n"]) == []
    )
    with pytest.raises(ValueError, match="unknown parameter a, b; known: regime, seed, model"):
        notebook.parameters({"In": ["# Parameters\nb = 1\nregime = 2\na = b = 3"]}, known)


def test_a_folder_is_where_it_is_or_the_projects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert (
        notebook.folder("here").resolve() == tmp_path / "here"
        and notebook.folder("gone") == notebook.ROOT / "gone"
    )
    assert notebook.folder(str(tmp_path / "gone")) == tmp_path / "gone"


def test_two_small_runs_are_made_only_where_none_has_finished(tmp_path, monkeypatch, capsys):
    made = []

    def execute(params, target, progress):
        made.append((params["regime"], params["recipe"], params["steps"], progress))
        target.mkdir(parents=True)
        (target / "result.json").write_text("{}")

    monkeypatch.setattr("vramlab.runs.execute.execute", execute)
    monkeypatch.setattr(notebook, "ROOT", tmp_path)
    example = tmp_path / "outputs" / "example"
    for _ in range(2):
        assert notebook.runs_folder(str(tmp_path / "none"), progress=False) == example
        assert made == [("full", "smoke", 4, False), ("checkpoint", "smoke", 4, False)]
        assert "no finished runs" in capsys.readouterr().out
    assert notebook.runs_folder(str(example)) == example and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "slider"),
    [(list(range(9)), True), (list(range(8)), False), ([*range(9), "x"], False)],
)
def test_more_than_eight_numbers_are_a_slider(options, slider, monkeypatch):
    widgets = SimpleNamespace(
        IntSlider=lambda *args, **named: ("slider", args, named["description"]),
        Dropdown=lambda **named: ("list", named["options"], named["description"]),
    )
    monkeypatch.setattr(notebook, "ipywidgets", widgets)
    found = notebook._control("run_name", options[::-1] if slider else options)
    assert found == (("slider", (8, 0, 8), "run name") if slider else ("list", options, "run name"))


def test_what_is_empty_is_said_to_be_left_out(monkeypatch):
    shown = []
    monkeypatch.setattr(notebook, "display", shown.append)
    monkeypatch.setattr(notebook, "Markdown", lambda text: ("markdown", text))
    full, empty = SimpleNamespace(data=[1]), SimpleNamespace(data=[])
    notebook.show("text", full, empty, None, [])
    assert (
        shown
        == [("markdown", "text"), full] + [("markdown", "*Left out: no run of it has ended.*")] * 3
    )


def test_verdicts_are_counted_in_the_order_they_come(monkeypatch):
    shown = []
    monkeypatch.setattr(notebook, "show", lambda *things: shown.extend(things))
    monkeypatch.setattr(
        "vramlab.studies.claims.table", lambda found: SimpleNamespace(drop=lambda columns: columns)
    )
    notebook.verdicts(
        SimpleNamespace(
            verdicts=lambda: [SimpleNamespace(word=word) for word in ("holds", "open", "holds")]
        )
    )
    assert shown == ["study", "**2 holds, 1 open**, of 3 claims."]


# the environment ----------------------------------------------------------------------------------


def test_equal_weights_have_one_hash_and_any_other_another():
    def made(**changes):
        model = torch.nn.Linear(2, 2)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
            model.bias.zero_()
        for name, value in changes.items():
            setattr(model, name, torch.nn.Parameter(value))
        return sharded.weights_hash(model)

    others = [
        made(bias=torch.tensor([0.0, 1e-30])),
        made(bias=torch.tensor([0.0, -0.0])),
        made(bias=torch.zeros(2).double()),
        made(bias=torch.zeros(1, 2)),
        made(more=torch.zeros(1)),
        made(),
    ]
    assert made() == others.pop() and len({made(), *others}) == 6


def test_an_environment_names_what_is_there(monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10}.__getitem__)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "old:1")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setattr(environment, "needed", lambda: (True, "no AMX"))
    found = environment.record()
    assert (found["host_memory_bytes"], found["allocator"], found["device"]["kind"]) == (
        40960,
        "old:1",
        "cpu",
    )
    assert (
        found["bf16"] == "formed in fp32 and rounded: no AMX"
        and found["versions"]["torch"] == torch.__version__
    )
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "new:1")
    monkeypatch.setattr(environment, "needed", lambda: (False, "AMX"))
    assert (environment.record()["allocator"], environment.record()["bf16"]) == (
        "new:1",
        "native: AMX",
    )
    assert environment.version("no-such-package-here") == "not installed"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment._device("cuda:0") == {"kind": "cuda", "name": "none that torch sees"}
    monkeypatch.setattr(environment, "ROOT", "/nowhere")
    assert environment._commit() == {"commit": "unknown", "dirty": None}


def test_a_child_whose_parent_is_gone_ends_and_takes_its_turn_once(monkeypatch, tmp_path):
    asked, ended, locked = [], [], []
    monkeypatch.setattr(
        children.ctypes, "CDLL", lambda _: SimpleNamespace(prctl=lambda *args: asked.append(args))
    )
    monkeypatch.setattr(children.os, "_exit", ended.append)
    children.die_with(os.getppid())
    assert asked == [(1, signal.SIGTERM)] and ended == []
    children.die_with(-1)
    assert ended == [1]
    monkeypatch.setattr(children.ctypes, "CDLL", lambda _: SimpleNamespace())
    children.die_with(-1)
    assert ended == [1], "where there is no prctl nothing is done"
    monkeypatch.setattr(children, "_turn", [])
    monkeypatch.setattr(children.fcntl, "flock", lambda file, how: locked.append((file.name, how)))
    monkeypatch.delenv(children.TURN, raising=False)
    children.take_turn()
    assert locked == []
    monkeypatch.setenv(children.TURN, str(tmp_path / "turn"))
    children.take_turn()
    children.take_turn()
    assert locked == [(str(tmp_path / "turn"), children.fcntl.LOCK_EX)]
    children._turn.pop().close()


# the doctor ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "can"),
    [
        ("2.10.9", False),
        ("2.11.0", True),
        ("2.13.5+cu130", True),
        ("2.14.0", False),
        ("3.0.0", False),
        ("1.12.0", False),
    ],
)
def test_torchs_version_lies_within_what_was_tested(version, can, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert doctor._torch().can is can


def test_a_finding_is_a_line_and_its_way_out_another_where_it_cannot_be_had():
    found = [
        doctor.Finding("a", True, "there", "never told"),
        doctor.Finding("b", False, "none", "buy one"),
        doctor.Finding("c", False, "x"),
    ]
    assert doctor.words(found).splitlines() == [
        f"yes a{'':<26}there",
        f"no  b{'':<26}none",
        f"{'':<31}-> buy one",
        f"no  c{'':<26}x",
    ]


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("max", ""),
        (str(4 * GIB), ""),
        (str(2 * GIB), ", of which this container may use 2.0"),
        (None, ""),
    ],
)
def test_host_memory_is_capped_by_a_container(limit, words, monkeypatch, tmp_path):
    files = {"/proc/meminfo": tmp_path / "meminfo"}
    files["/proc/meminfo"].write_text(
        "MemTotal:  4194304 kB\nMemAvailable:  1048576 kB\nOther: 1 kB\n"
    )
    if limit:
        (tmp_path / "limit").write_text(f"{limit}\n")
    monkeypatch.setattr(doctor, "CGROUP_LIMITS", (str(tmp_path / "none"), str(tmp_path / "limit")))
    path = doctor.Path
    monkeypatch.setattr(doctor, "Path", lambda name: path(files.get(name, name)))
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 3)
    assert doctor._memory().found == f"4.0 GiB{words}, 1.0 available, 3 cores"


def test_what_this_machine_lacks_is_named(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=GIB))
    assert not doctor._disk().can
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=GIB + 1))
    assert doctor._disk().can and doctor._disk().found == "1.0 GiB free here"
    there: set[str] = set()
    monkeypatch.setattr(
        doctor.shutil, "which", lambda name: f"/bin/{name}" if name in there else None
    )
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name: name if name in there else None
    )
    assert (doctor.browser(), doctor._browser().can, doctor._browser().found) == (
        None,
        False,
        "no Chromium and no playwright",
    )
    assert not doctor._ranks().can
    there |= {"google-chrome", "playwright", "torch.distributed.run"}
    assert (
        doctor.browser() == "/bin/google-chrome" and doctor._browser().can and doctor._ranks().can
    )
    there |= {"chromium"}
    assert doctor.browser() == "/bin/chromium"
    for name in ("gloo", "nccl"):
        monkeypatch.setattr(doctor.distributed, f"is_{name}_available", lambda: False)
    assert not doctor._ranks().can
    monkeypatch.setattr(doctor.distributed, "is_available", lambda: False)
    assert "not in this torch" in doctor._ranks().found
    for library, can in (("glibc", True), ("musl", False)):
        monkeypatch.setattr(doctor.platform, "libc_ver", lambda library=library: (library, "1"))
        assert (
            doctor._process_peak().can is can
            and ("not glibc" in doctor._process_peak().found) is not can
        )


def test_why_there_is_no_card_and_how_bf16_is_formed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built for the CPU only" in doctor._cuda().found
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for hidden, words in (
        ("", "hides"),
        ("-1", "hides"),
        ("0", "finds no card"),
        ("1", "finds no card"),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert words in doctor._cuda().found
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "finds no card" in doctor._cuda().found
    for needed, words in ((True, "formed in fp32 and rounded: why"), (False, "native: why")):
        monkeypatch.setattr(doctor.environment, "needed", lambda needed=needed: (needed, "why"))
        assert (doctor._bf16().can, doctor._bf16().found) == (not needed, words)
    assert not doctor._history().can
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delattr(torch.cuda.memory, "_snapshot")
    assert not doctor._history().can and "lacks _snapshot" in doctor._history().found


@pytest.mark.parametrize(
    ("sample", "can", "words"),
    [
        ({"energy_j": 0.0, "power_w": None}, True, "the card's counter"),
        ({"energy_j": None, "power_w": 0.0}, True, "power, integrated"),
        ({"energy_j": None, "power_w": None}, False, "energy_j: N/A; power_w: N/A"),
    ],
)
def test_energy_by_counter_else_by_power(sample, can, words):
    reader = SimpleNamespace(
        sample=lambda: sample, notes=["energy_j: N/A", "x: N/A", "power_w: N/A"]
    )
    assert (doctor._energy(reader).can, words in doctor._energy(reader).found) == (can, True)
