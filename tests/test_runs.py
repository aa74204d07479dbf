"""What all six models promise as programs: runs, resuming, flags, the README's commands."""

import argparse
import ast
import contextlib
import importlib
import inspect
import json
import random
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch

from conftest import CLASSES, GPU, MODELS, MODULES, ROOT, copy, outcome, silence, train
import data
import sample

all_six = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def own_run(brief, tmp_path, no_music):
    """A finished tiny run of lstm.py."""
    train("lstm", brief, tmp_path / "lstm")
    return tmp_path / "lstm"


@all_six
def test_a_stopped_run_ends_bit_for_bit_as_the_uninterrupted_one(
        name, brief, tmp_path, monkeypatch, no_music):
    train(name, brief, tmp_path / "whole", steps=4)
    whole, add, stops = outcome(tmp_path / "whole"), data.Run.add, []

    def add_and_stop(run, *args):
        add(run, *args)
        if run.step == stops[-1]:
            raise KeyboardInterrupt
    monkeypatch.setattr(data.Run, "add", add_and_stop)
    for stop, more in ((3, []), (whole[0][0] - 1, ["--resume"])):  # both between two log lines
        stops.append(stop)
        with pytest.raises(KeyboardInterrupt):
            train(name, brief, tmp_path / "cut", *more, steps=4)
    stops.append(None)
    MODULES[name].main(["--out", str(tmp_path / "cut"), "--resume"])  # with the run's own flags
    assert outcome(tmp_path / "cut") == whole


@all_six
def test_a_file_and_data_py_alone_train(name, brief, tmp_path, monkeypatch):
    """In a folder of their own. Ctrl-C and matplotlib are afterwards as they were before."""
    copy([ROOT / "data.py", ROOT / f"{name}.py"], tmp_path)
    copy(sorted(brief.glob("*.mid"))[:4], tmp_path / "music")
    elsewhere = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tests")]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    for module in (*MODELS, "data", "sample"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.chdir(tmp_path)
    matplotlib.use("svg")
    handler = signal.getsignal(signal.SIGINT)
    copies = [importlib.import_module(module) for module in ("data", name)]
    assert {Path(copy.__file__).parent for copy in copies} == {tmp_path}
    music = {"sample.mid", "sample.wav", "sample.png", "curves.png"} if name == "lstm" else set()
    music or silence(monkeypatch, copies[0])
    train(name, "music", "run", steps=2)
    written = {path.name for path in Path("run").iterdir()}
    assert written == {"model.pt", "last.pt", "log.csv", "result.json"} | music
    assert signal.getsignal(signal.SIGINT) is handler and matplotlib.get_backend() == "svg"


PAPER = {"lstm": "--lr 1e-3 --weight-decay 0 --voices 1", "vae": "--paper --voices 1 --segment 8",
         "attn_lstm": "--heads parallel --average 0 --without relations attention",
         "hvae": "--paper --voices 1 --segment 8", "vqvae": "--codes 1 --pattern 4",
         "wgan": "--gp 0 --clip 0.01 --critic-lr 0.1"}


@all_six
def test_the_papers_settings_train(name, brief, tmp_path, no_music):
    train(name, brief, tmp_path, *PAPER[name].split(), steps=2)
    test = json.loads((tmp_path / "result.json").read_text())["test"]
    last = data.load_checkpoint(tmp_path / "last.pt", name)
    assert 0 < test.get("prior_nll", 0.1) < test.get("nll", 1)
    assert sample.load_model(tmp_path).sample(1, 8).shape == (1, 8, 88)
    if "--paper" in PAPER[name]:
        config = {"hidden": 16, "latent": 32, "feed": "softmax", "features": 0, "drop": 0}
        assert config.items() <= last["config"].items()
    if "--clip" in PAPER[name]:
        critic = [weight.abs().max().item() for key, weight in last["parts"]["model"].items()
                  if key.startswith("critic")]
        assert max(critic) == pytest.approx(0.01)


@all_six
@GPU
def test_steps_on_a_gpu_never_wait_for_it(name, brief, tmp_path, monkeypatch, no_music):
    add = data.Run.add

    def add_and_watch(run, *args):
        add(run, *args)
        with contextlib.suppress(AttributeError):  # a pretended GPU knows no such mode
            torch.cuda.set_sync_debug_mode("error" if run.step in (1, 4) else "default")
    monkeypatch.setattr(data.Run, "add", add_and_watch)
    train(name, brief, tmp_path, "--device", "cuda", steps=3, eval_every=3)


# Where nothing is random but the batch, a share of it computes what it does in the whole batch.
EXACT = {"lstm": "--dropout 0", "vae": "--latent 0 --dropout 0 --dropout-heads 0 --drop 0",
         "attn_lstm": "--dropout-input 0 --dropout 0 --dropout-heads 0"}


def trainings(flags, corpus, out, monkeypatch):
    """Train these models, {name: flags}, and resume lstm; in all processes they end alike."""
    silence(monkeypatch)
    finish = data.Run.finish

    def finish_alike(run, evaluate):
        finish(run, evaluate)
        for tensor in run.model.state_dict().values():
            assert torch.equal(data.sum_over_processes(tensor), data.WORLD * tensor), run.name
    monkeypatch.setattr(data.Run, "finish", finish_alike)
    for name, more in flags.items():
        train(name, corpus, f"{out}/{name}", "--batch", 7, *more.split(), steps=3, eval_every=9)
    MODULES["lstm"].main(["--out", f"{out}/lstm", "--resume", "--steps", "5"])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed here")
def test_two_processes_do_what_one_does(brief, tmp_path, monkeypatch):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc_per_node=2", __file__, brief, tmp_path / "two"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as two:
        try:
            trainings(EXACT, brief, tmp_path / "one", monkeypatch)
            said, errors = two.communicate(timeout=300)
        finally:
            two.terminate()
    assert two.returncode == 0, errors
    assert said.count("test: ") == 6  # five trainings and one resumed, each said once
    for name in EXACT:  # the same losses
        one, two = (outcome(tmp_path / count / name)[0][2] for count in ("one", "two"))
        assert len(one) == (2 if name == "lstm" else 1)
        assert all(a == pytest.approx(b, rel=1e-5) for a, b in zip(one, two, strict=True)), name


def test_result_and_log(own_run):
    result = json.loads((own_run / "result.json").read_text())
    assert set(result) == {"model", "params", "steps", "train_seconds", "frames_per_second",
                           "corpus", "time_step", "config", "test"}
    assert result["steps"] == 6 and result["time_step"] == 0.5 and result["config"]["hidden"] == 16
    last, best = (data.load_checkpoint(own_run / name) for name in ("last.pt", "model.pt"))
    least = min(last["rows"], key=lambda row: row["valid_nll"])
    assert (best["best"], best["step"]) == (least["valid_nll"], least["step"])
    assert re.findall(r"^\w+", (own_run / "log.csv").read_text(), re.M) == ["step", "2", "4", "6"]


def test_only_force_replaces_a_run_and_its_own_files_alone(brief, own_run, one_line):
    (own_run / "sample.wav").touch()
    (own_run / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in own_run.iterdir()}
    assert "--resume, --force, or another --out" in one_line(train, "lstm", brief, own_run)
    assert before == {path: path.read_bytes() for path in own_run.iterdir()}
    train("lstm", brief, own_run, "--force", steps=2)
    assert (own_run / "notes.txt").read_text() == "mine"
    assert not (own_run / "sample.wav").exists()  # the old run's; this one wrote no music


def test_a_diverged_run_goes_on_with_a_smaller_lr(own_run, one_line, monkeypatch):
    """On the CPU, even where a GPU has appeared."""
    monkeypatch.setattr(data, "device_name", lambda text: text.replace("auto", "cuda"))
    resume = ["--out", str(own_run), "--resume", "--steps", "10"]
    assert "a smaller --lr" in one_line(MODULES["lstm"].main, [*resume, "--lr", "1e25"])
    MODULES["lstm"].main([*resume, "--lr", "1e-4"])
    held = data.load_checkpoint(own_run / "last.pt")
    assert held["args"]["lr"] == 1e-4 and held["args"]["hidden"] == 16
    assert [row["step"] for row in held["rows"]] == [2, 4, 6, 8, 10]


def test_checkpoints_that_do_not_fit_or_have_a_flipped_bit_are_one_line(own_run, one_line):
    resume = ["--out", str(own_run), "--resume", "--steps", "8"]
    assert "does not fit" in one_line(MODULES["lstm"].main, [*resume, "--hidden", "17"])
    assert "holds a model of lstm.py, not of vae.py" in one_line(MODULES["vae"].main, resume)
    held = data.load_checkpoint(own_run / "last.pt")
    data.save_checkpoint(own_run / "last.pt", held | {"rows": {}})
    assert "last.pt: damaged" in one_line(MODULES["lstm"].main, resume)
    (own_run / "last.pt").unlink()
    assert "last.pt: no such file" in one_line(MODULES["lstm"].main, resume)
    path, rng = own_run / "model.pt", random.Random(0)
    weight = data.load_checkpoint(path)["parts"]["model"]["out.weight"].numpy().tobytes()
    start, content = path.read_bytes().index(weight), bytearray(path.read_bytes())
    for place in rng.choices(range(start, start + len(weight)), k=20):
        content[place] ^= (bit := 1 << rng.randrange(8))
        path.write_bytes(content)
        assert "model.pt: damaged" in one_line(data.load_checkpoint, path)
        content[place] ^= bit


def test_ctrl_c_and_too_little_memory_are_one_line(one_line):
    def ctrl_c():
        raise KeyboardInterrupt
    assert "--resume" in one_line(ctrl_c)
    assert "not enough memory" in one_line(torch.empty, 2**60)


@pytest.mark.parametrize("name, flags", [
    ("lstm", "--lr 0"), ("lstm", "--lr nan"), ("lstm", "--steps -1"), ("lstm", "--steps many"),
    ("lstm", "--steps 99999999999"), ("lstm", "--time-step 0/4"), ("lstm", "--time-step x"),
    ("lstm", "--device abacus"), ("lstm", "--voices 0"), ("lstm", "--step 1"),
    ("lstm", "--data nowhere"), ("attn_lstm", "--attention-heads 3"), ("vae", "--dropout 1"),
    ("vae", "--segment 5"), ("hvae", "--segment 5"), ("vqvae", "--codes 3"),
    ("vqvae", "--codebook 0"), ("vqvae", "--window 31"), ("wgan", "--heads 3"),
    ("wgan", "--patch 5"), ("wgan", "--window 1000")])
def test_bad_flags_are_one_line(name, flags, brief, tmp_path, one_line):
    said = one_line(train, name, brief, tmp_path / "run", *flags.split())
    assert flags.split()[0] in said and not (tmp_path / "run").exists()


@pytest.fixture
def parser_of(monkeypatch):
    """The parser of a program, caught before anything runs."""
    def stop(parser, *_):
        raise StopIteration(parser)

    def parser_of(program):
        with monkeypatch.context() as patch, pytest.raises(StopIteration) as caught:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            importlib.import_module(program).main()
        return caught.value.args[0]
    monkeypatch.setattr(data, "device_name", str)  # a command for a GPU is a command anywhere
    return parser_of


@all_six
def test_flags_and_constructor_agree(name, parser_of):
    parser = parser_of(name)
    shared = inspect.signature(CLASSES[name]).parameters
    assert len(shared) > 3
    for parameter in shared.values():  # each is a flag, with the same default
        assert parser.get_default(parameter.name) == parameter.default, parameter.name
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert flags >= set("--data --time-step --voices --window --transpose --out --steps --batch "
                        "--lr --seed --device --eval-every --resume --force".split())
    assert all(action.help for action in parser._actions)


@all_six
def test_model_files_import_nothing_of_each_other(name):
    allowed = {"data", "torch", "numpy"} | sys.stdlib_module_names
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [getattr(node, "module", alias.name) for alias in node.names]
            assert {module.split(".")[0] for module in modules} <= allowed


def commands(text):
    """The `python FILE.py ...` commands in a text's code: [(FILE, words)]."""
    text = re.sub(r"\s*\\\n\s*", " ", text)
    code = re.findall(r"```.*?```|^ {4}[^\n]*|`[^`]+`", text, re.M | re.S)
    code = [part if part[:3] == "```" else " ".join(part.split()) for part in code]
    found = re.findall(r"\bpython (\S+?)\.py([^`#&|;\n]*)", "\n".join(code))
    return [(file, words) for file, words in found if file.islower()]


@pytest.mark.parametrize("name", ["README.md", "sample", "data", *MODELS])
def test_every_command_that_is_written_down_parses(name, parser_of):
    text = (ROOT / name).read_text() if "." in name else importlib.import_module(name).__doc__
    found = commands(text)
    assert len(found) > (20 if name == "README.md" else 0), found
    for file, words in found:
        words = shlex.split(re.sub(r"\b[A-Z]\b", "8", words))  # --latent Z stands for any
        try:
            parser_of(file.removeprefix("tests/")).parse_args(words)
        except (data.InputError, SystemExit) as error:
            pytest.fail(f"{name}: python {file}.py {shlex.join(words)}: {error}")


if __name__ == "__main__":  # what each of two processes does
    every = EXACT | {"vqvae": "", "wgan": ""}
    data.cli(lambda: trainings(every, *sys.argv[1:], pytest.MonkeyPatch()))
