"""What all scripts have in common: the form, equal copies, and a README that says what they say."""

import ast
import dataclasses
import importlib
import re
import shlex
from collections import defaultdict
from inspect import signature
from itertools import product
from pathlib import Path

import pytest
import torch
import tyro
from torch import nn

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
ROLES = {"Args", "main", "evaluate", "update", "worker", "make_env", "actor", "learner", "run"}
ROLES |= {"make_optimizer", "make_network", "learning_rate_at", "check_flags"}
ROLES |= {"Segment", "play", "a3c_loss"}
TWO_OF_ONE_NAME = {"GlimpseNetwork"}  # RAM and DRAM call two networks alike
OWN_CONSTANTS = {"KEPT", "Task"}  # of one name, each script's own
CONSTANT = ast.Assign, ast.AugAssign
UNANNOTATED = {"writer", "T", "log", "optimizer", "save", "evaluate_now"}
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "results" / "README.md").read_text()
each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def arguments(path: Path) -> ast.ClassDef:
    (found,) = (n for n in parse(path).body if isinstance(n, ast.ClassDef) and n.name == "Args")
    return found


def experiments(path: Path) -> list[tuple[str, str]]:
    """The (command, result) pairs of a script's header."""
    header = ast.get_docstring(parse(path))
    pairs = re.findall(
        r"^    Run +(.+)\n((?: {6,}.+\n)*)    Result +(.+(?:\n {6,}.+)*)", header, re.M
    )
    return [(one_line(run + " " + more), one_line(result)) for run, more, result in pairs]


def one_line(text: str) -> str:
    return " ".join(text.replace("\\", " ").split())


def table(text: str) -> list[dict[str, str]]:
    """The rows of the first table of a markdown text, by column title."""
    lines = text[text.index("\n|") + 1 :].split("\n\n")[0].splitlines()
    titles, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(titles, row, strict=True)) for row in rows]


def unrolled(shell: str) -> str:
    """A shell script's lines, those of its loops once for every value."""
    lines, loops = [], []
    for line in map(str.strip, shell.splitlines()):
        if loop := re.match(r"for (\w+) in (.+); do$", line):
            loops.append([(loop[1], value) for value in loop[2].split()])
        elif line == "done":
            loops.pop()
        else:
            for values in product(*loops):
                filled = line
                for name, value in values:
                    filled = re.sub(rf"\$\{{?{name}\b\}}?", value, filled)
                lines.append(filled)
    return "\n".join(lines)


def commands(text: str) -> list[str]:
    """Every call of one of our scripts in a markdown text."""
    joined = text.replace("\\\n", " ")
    return [one_line(c) for c in re.findall(r"python ((?:\w+)\.py[^`\n|#]*)", joined)]


@each_script
def test_header(path):
    header = ast.get_docstring(parse(path))
    for item in (
        "    Paper    ",
        "    Shows    ",
        "    Run      ",
        "    Result   ",
        "Departures: ",
    ):
        assert f"\n{item}" in header, f"{path.name}: no {item.strip()} in the header"
    assert header.splitlines()[1] == "" and experiments(path)
    assert (ROOT / "tests" / f"test_{path.name}").exists()


@each_script
def test_nothing_runs_at_import_and_no_script_needs_another(path):
    *body, guard = parse(path).body
    assert ast.unparse(guard) == (
        "if __name__ == '__main__':\n    print(main(tyro.cli(Args, description=__doc__)))"
    )
    for node in body[1:]:
        kinds = (*CONSTANT, ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
        assert isinstance(node, kinds), f"{path.name}:{node.lineno} runs at import"
        if isinstance(node, CONSTANT):
            calls = [n for n in ast.walk(node.value) if isinstance(n, ast.Call)]
            assert not calls, f"{path.name}:{node.lineno} computes at import"
    for node in ast.walk(ast.Module(body, [])):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or "."]
        else:
            continue
        assert not {module.split(".")[0] for module in modules} & {p.stem for p in SCRIPTS}


@each_script
def test_every_flag_has_one_line_with_help(path):
    lines = path.read_text().splitlines()
    groups = []
    node = arguments(path)
    for number in range(node.lineno, node.end_lineno):
        line = lines[number].strip()
        if line.startswith("# "):
            groups.append(line)
        elif line:
            assert re.fullmatch(r"\w+: .+ = .+  # \S.+", line), f"{path.name}:{number + 1}: {line}"
    assert groups == ["# The method", "# Optimisation", "# The run"]


@each_script
def test_help_names_the_paper_and_explains_every_flag(path, capsys):
    script = importlib.import_module(path.stem)
    with pytest.raises(SystemExit) as end:
        tyro.cli(script.Args, description=script.__doc__, args=["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "Paper" in shown and "Departures" in shown
    for field in dataclasses.fields(script.Args):
        assert "--" + field.name.replace("_", "-") in shown


@each_script
def test_resume_goes_on_in_the_folder_of_its_checkpoint(path):
    """The flags of a run and --resume go on with it, as Ctrl-C's sentence says."""
    script = importlib.import_module(path.stem)
    script.check(script.Args(resume="run/checkpoint.pt", run_dir="./run/"))
    with pytest.raises(SystemExit, match="leave --run-dir out"):
        script.check(script.Args(resume="run/checkpoint.pt", run_dir="another"))


@each_script
def test_a_checkpoint_that_lacks_a_part_is_refused_with_a_sentence(path, tmp_path):
    script, net = importlib.import_module(path.stem), nn.Linear(2, 1)
    file = tmp_path / "checkpoint.pt"
    torch.save({"args": {}, "net": net.state_dict()}, file)
    checkpoint = script.load_checkpoint(file, script.Args(), net)
    assert checkpoint["args"] == {} and checkpoint.get("optimizer") is None
    with pytest.raises(SystemExit, match="has no optimizer: another version of this script"):
        checkpoint["optimizer"]


@each_script
def test_pictures_that_cannot_be_written_end_no_run(path, tmp_path, capsys):
    from matplotlib.figure import Figure
    from PIL import Image

    script, at = importlib.import_module(path.stem), tmp_path / "missing" / "picture"
    writers = {
        "write_gif": ([Image.new("RGB", (2, 2))], at.with_suffix(".gif"), 100),
        "write_figure": (Figure(), at.with_suffix(".png")),
        "save_figure": (Figure(), at.with_suffix(".png")),
    }
    found = [name for name in writers if hasattr(script, name)]
    for name in found:
        getattr(script, name)(*writers[name])
    assert capsys.readouterr().out.count("cannot be written") == len(found) > 0
    saves = re.findall(r"\.save(?:fig)?\(path\b", path.read_text())
    assert len(saves) == len(found)


@each_script
def test_sections_stand_in_their_order(path):
    titles = re.findall(r"^# ---- (.+?) -+$", path.read_text(), re.M)
    assert titles[0] == "The method" and titles[-1] == "Evaluation and training"
    assert set(titles[1:-1]) <= {"The data", "The game", "The games"}
    for line in re.findall(r"^# ----.*$", path.read_text(), re.M):
        assert len(line) == 99


@each_script
def test_names(path):
    tree = parse(path)
    classes = {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    assert not classes & {"Model", "Net", "Agent", "Trainer", "Network"}
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    assert not names & {"done", "dones", "args_dict"}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            annotated = [a.annotation for a in node.args.args if a.arg not in UNANNOTATED]
            assert all(annotated), f"{path.name}:{node.lineno}: {node.name} is not annotated"
            private = node.name.startswith("_")
            assert not private, f"{path.name}:{node.lineno}: every function can be read and tested"


def top_level(source: str) -> dict[str, str]:
    """The text of every function, class and constant."""
    texts = defaultdict(str)
    for node in ast.parse(source).body:
        targets = getattr(node, "targets", [getattr(node, "target", node)])
        for name in (n for target in targets for n in getattr(target, "elts", [target])):
            name = getattr(name, "id", getattr(name, "name", ""))
            texts[name] += ast.get_source_segment(source, node) if name else ""
    return texts


@each_script
def test_every_function_is_used(path):
    tree = parse(path)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} <= used


def test_equal_names_have_equal_text():
    texts = defaultdict(lambda: defaultdict(list))
    for path in SCRIPTS:
        for name, text in top_level(path.read_text()).items():
            if name not in ROLES | TWO_OF_ONE_NAME | OWN_CONSTANTS | {""}:
                texts[name][text].append(path.name)
    differing = {name: list(t.values()) for name, t in texts.items() if len(t) > 1}
    assert not differing


def test_both_scripts_of_the_atari_experiments_play_the_same_game():
    """Only the tests of one look at the preprocessing."""
    texts = [(ROOT / name).read_text() for name in ("a3c_atari.py", "async_nstep_q.py")]
    games = [top_level(text)["make_env"] for text in texts]
    assert games[0] == games[1]


def test_the_same_flag_has_the_same_help():
    common = {"seed", "run_dir", "resume", "evaluate", "eval_episodes", "num_workers", "data_dir"}
    common |= {"device", "eval_epsilon", "rmsprop_decay", "envs_per_worker", "monte_carlo_samples"}
    texts = defaultdict(lambda: defaultdict(list))
    for path in SCRIPTS:
        lines = path.read_text().splitlines()
        for node in arguments(path).body:
            if isinstance(node, ast.AnnAssign) and node.target.id in common - {"run_dir", "seed"}:
                line = re.sub(r"= .*?  #", "#", lines[node.lineno - 1])
                texts[node.target.id][line].append(path.name)
    differing = {name: dict(t) for name, t in texts.items() if len(t) > 1}
    assert not differing


def accept(script: str, flags: list[str]) -> None:
    """Raises unless the script takes these flags, each by itself and all together."""
    module = importlib.import_module(Path(script).stem)
    args = tyro.cli(module.Args, args=flags)
    for name, check in vars(module).items():
        if name.startswith("check") and len(signature(check).parameters) == 1:
            check(args)


COMMANDS = commands(unrolled((ROOT / "results" / "commands.sh").read_text()))


@pytest.mark.parametrize("command", sorted({*commands(README), *commands(RESULTS), *COMMANDS}))
def test_commands_of_the_documents_are_accepted(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where no run is yet
    script, *flags = shlex.split(command)
    accept(script, flags)


@each_script
def test_commands_of_the_headers_are_accepted(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    header = ast.get_docstring(parse(path))
    more = map(one_line, re.findall(r"python \w+\.py.*(?:\n +--.+)*", header))
    for command in {command for command, _ in experiments(path)} | set(more):
        python, script, *flags = shlex.split(command)
        assert (python, script) == ("python", path.name)
        accept(script, flags)


def says(result: str, ours: str) -> bool:
    """Whether a Result begins with this number, whole."""
    return bool(re.match(re.escape(ours) + r"(?![.,]?\d)", result))


def measured(path: Path) -> dict[str, str]:
    return {c: result for c, result in experiments(path) if result != "not yet measured"}


def test_the_readmes_numbers_are_those_of_the_scripts():
    """Each measured experiment of a header is a row of the README, in the header's order."""
    script, rows = "", defaultdict(list)
    for row in table(README):
        script = re.match(r"\[(\w+\.py)\]|$", row["script, paper"])[1] or script
        rows[script].append(row["ours"])
    assert rows.keys() == {path.name for path in SCRIPTS if measured(path)}
    for path in SCRIPTS:
        for result, ours in zip(measured(path).values(), rows[path.name], strict=True):
            assert says(result, ours), f"{path.name}: {ours} is not its result {result}"


def test_the_results_numbers_are_those_of_the_scripts():
    """Each measured experiment of a header is a row of results/README.md, and no other."""
    results = {c: result for path in SCRIPTS for c, result in measured(path).items()}
    rows = {re.search(r"`(python .+?)`", row["command"])[1]: row["ours"] for row in table(RESULTS)}
    assert rows.keys() == results.keys()
    for command, ours in rows.items():
        assert says(results[command], ours), f"{command}: {ours} is not its result"


def test_math_a_result_says_a_whole_number():
    assert says("19.4 (30 games)", "19.4") and says("5.34 % of pairs", "5.34 %")
    assert not says("19.4 (30 games)", "1") and not says("19.45", "19.4")
    assert not says("2.00 %", "2") and not says("5,700", "5")
