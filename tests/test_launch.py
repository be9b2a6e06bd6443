"""The launchers: every rank gets its place, signals reach the ranks, exit codes come back, dry runs tell."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, wait_for

SCRIPTS = [ROOT / "launch" / name for name in ("local.sh", "train.sbatch", "site.env.example", "shard.sbatch", "study.sbatch")]
ACCELERATE = [ROOT / "accelerate_config.yaml", *sorted((ROOT / "launch/accelerate").glob("*.yaml"))]

# Stands in for Python: writes down what it was given, then does what $DO says.
RANK = """#!/usr/bin/env bash
trap 'echo TERM >> "$LOG/signals"; exit 85' TERM
trap 'echo USR1 >> "$LOG/signals"; exit 85' USR1
place="${RANK-} ${WORLD_SIZE-} ${LOCAL_RANK-} ${LOCAL_WORLD_SIZE-} ${MASTER_ADDR-}:${MASTER_PORT-}"
echo "$place $ACCELERATE_USE_CPU $*" \\
  > "$LOG/rank${RANK-}.partial"
mv "$LOG/rank${RANK-}.partial" "$LOG/rank${RANK-}"
eval "$DO"
"""

# Stands in for srun: starts the tasks of --ntasks on one node each, passes signals on, returns the largest exit code.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do case $1 in --ntasks=*) n=${1#*=} ;; esac; shift; done
pids=()
for ((i = 0; i < n; i++)); do
  SLURM_PROCID=$i SLURM_NTASKS=$n SLURM_LOCALID=0 SLURM_NODEID=$i "$@" & pids+=($!)
done
trap 'kill -USR1 "${pids[@]}"' USR1
trap 'kill -TERM "${pids[@]}"' TERM
code=0
for pid in "${pids[@]}"; do
  while true; do rc=0; wait "$pid" || rc=$?; kill -0 "$pid" 2>/dev/null || break; done
  ((rc <= code)) || code=$rc
done
exit "$code"
"""


@pytest.fixture
def machine(tmp_path):
    """Environment of a machine whose Python and SLURM are stand-ins, and a recipe."""
    tools = tmp_path / "bin"
    tools.mkdir()
    scontrol = '#!/usr/bin/env bash\nif [[ $1 == show ]]; then echo n1; echo n2; else echo "$*" >> "$LOG/scontrol"; fi\n'
    for name, text in {"rank": RANK, "srun": SRUN, "scontrol": scontrol}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    return {
        "PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(tmp_path), "LOG": str(tmp_path),
        "PYTHON": str(tools / "rank"), "DO": "exit 0", "LOCAL_PORT": "29555",
        "RECIPE": str(tmp_path / "recipe.yaml"), "PROJECT": str(ROOT),
    }  # fmt: skip


def start(script, words, env, **more):
    command = [str(ROOT / "launch" / script), *words]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        # tests run in the background or by nohup inherit them as ignored, and a shell cannot trap what it inherits so
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)], **more,
    )  # fmt: skip


def run(script, words, env):
    with start(script, words, env) as process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def ranks(env, count):
    """What each rank was given, once all of them have started."""
    files = await_files(env, *(f"rank{rank}" for rank in range(count)))
    return [file.read_text().split(maxsplit=6) for file in files]


def asked_of_slurm(env) -> str:
    asked = Path(env["LOG"], "scontrol")
    return asked.read_text() if asked.exists() else ""


def await_files(env, *names):
    """Files of the log folder, once all of them are there."""
    files = [Path(env["LOG"], name) for name in names]
    wait_for(lambda: all(file.exists() for file in files), f"all of {names}")
    return files


def test_local_gives_every_rank_its_place(machine):
    code, _, err = run("local.sh", ["--cpu", "3", machine["RECIPE"], "--optim.lr", "0.02"], machine)
    assert code == 0, err
    words = f"-m dist_train.train --config {machine['RECIPE']} --optim.lr 0.02"
    for rank, given in enumerate(ranks(machine, 3)):
        assert given[:6] == [str(rank), "3", str(rank), "3", "127.0.0.1:29555", "true"]
        assert given[6].strip() == words


def test_local_starts_one_process_plainly_whatever_the_shell_holds(machine):
    code, _, err = run("local.sh", ["--cpu", "1", machine["RECIPE"]], machine | {"RANK": "3", "WORLD_SIZE": "8"})
    assert code == 0, err
    assert Path(machine["LOG"], "rank").read_text().split()[:2] == [":", "true"]


def test_a_rank_that_stopped_in_order_leaves_the_others_their_time(machine):
    do = "[[ $RANK == 1 ]] && exit 85; sleep 4; echo written > $LOG/written; exit 85"
    code, _, _ = run("local.sh", ["--cpu", "2", machine["RECIPE"]], machine | {"DO": do, "GRACE_S": "1"})
    assert code == 85 and Path(machine["LOG"], "written").exists()


def test_a_python_that_is_named_is_the_one_that_runs(machine):
    code, _, err = run("local.sh", ["--cpu", "2", machine["RECIPE"]], machine | {"PYTHON": "/no/such/python"})
    assert code and "PYTHON is /no/such/python, which is no program" in err


@pytest.mark.parametrize("do, expected", [
    ("exit 85", 85), ("[[ $RANK == 1 ]] && exit 7; exec sleep 60", 7),
    ("[[ $RANK == 1 ]] && kill -KILL $$; sleep 0.5; exit 86", 137),  # the other one notices
])  # fmt: skip
def test_local_returns_the_code_of_the_first_rank_that_failed(machine, do, expected):
    began = time.monotonic()
    code, _, _ = run("local.sh", ["--cpu", "2", machine["RECIPE"]], machine | {"DO": do, "GRACE_S": "1"})
    assert code == expected
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("number, name", [(signal.SIGTERM, "TERM"), (signal.SIGINT, "TERM"), (signal.SIGUSR1, "USR1")])
def test_local_passes_signals_to_every_rank(machine, number, name):
    env = machine | {"DO": "while true; do sleep 0.05; done"}
    with start("local.sh", ["--cpu", "2", machine["RECIPE"]], env) as process:
        ranks(env, 2)
        process.send_signal(number)
        process.communicate(timeout=30)
    assert process.returncode == 85
    assert Path(env["LOG"], "signals").read_text().split() == [name, name]


def test_a_terminal_that_goes_away_lets_every_rank_save(machine):
    env = machine | {"DO": "while true; do sleep 0.05; done"}
    with start("local.sh", ["--cpu", "2", machine["RECIPE"]], env, start_new_session=True) as process:
        ranks(env, 2)
        os.killpg(process.pid, signal.SIGHUP)  # as the kernel does, to all at once
        process.communicate(timeout=30)
    assert process.returncode == 85
    assert Path(env["LOG"], "signals").read_text().split() == ["TERM", "TERM"]


@pytest.mark.parametrize("words, complaint", [
    ([], "found 0 words"), (["--cpu", "two", "RECIPE"], "not a number"),
    (["--tpu", "2", "RECIPE"], "expected --cpu or --gpus"), (["--cpu", "2", "nowhere.yaml"], "no recipe nowhere.yaml"),
    (["--cpu", "0", "RECIPE"], "not a number"),
])  # fmt: skip
def test_local_refuses_what_it_cannot_start(machine, words, complaint):
    code, _, err = run("local.sh", [machine.get(word, word) for word in words], machine)
    assert code == 2 and complaint in err


def test_dry_runs_show_the_commands_and_start_nothing(machine):
    env = machine | {"DRY_RUN": "1", "NODES": "2", "RANKS_PER_NODE": "4", "GPUS_PER_NODE": "4", "SBATCH_ACCOUNT": "physics"}
    code, out, err = run("local.sh", ["--gpus", "8", env["RECIPE"]], env)
    assert code == 0 and "8 x ACCELERATE_USE_CPU=false" in out, err
    code, out, err = run("train.sbatch", [env["RECIPE"], "--optim.lr", "0.02"], env)
    assert code == 0, err
    assert "SBATCH_ACCOUNT=physics" in out
    assert f"sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 launch/train.sbatch {env['RECIPE']} --optim.lr 0.02" in out
    assert "srun --kill-on-bad-exit=0 --wait=330 --ntasks=8 --ntasks-per-node=4 bash" in out
    assert f"--config {env['RECIPE']} --run runs/recipe-JOB --resume --optim.lr 0.02" in out
    code, out, _ = run("train.sbatch", [env["RECIPE"]], env | {"LAUNCHER": "accelerate"})
    assert "--ntasks=2 --ntasks-per-node=1" in out and "--num_machines 2 --num_processes 8" in out
    _, out, _ = run("train.sbatch", [env["RECIPE"]], env | {"CPUS_PER_RANK": "12", "cpus": "99"})  # as the job will have it
    assert "--cpus-per-task=12 launch/train.sbatch" in out and "--ntasks-per-node=4 --cpus-per-task=12 bash" in out
    assert "99" not in run("train.sbatch", [env["RECIPE"]], env | {"cpus": "99"})[1]
    assert not list(Path(env["LOG"]).glob("rank*"))


@pytest.mark.parametrize("name, complaint", [
    ("NODES", "NODES is x, RANKS_PER_NODE 1, CPUS_PER_RANK 1;"), ("RANKS_PER_NODE", "RANKS_PER_NODE x"), ("CPUS_PER_RANK", "x;"),
])  # fmt: skip
def test_a_job_of_no_size_is_not_submitted(machine, name, complaint):
    code, out, err = run("train.sbatch", [machine["RECIPE"]], machine | {"DRY_RUN": "1", name: "x"})
    assert code == 2 and out == "" and complaint in err and "expected whole numbers from 1" in err


def test_a_dry_run_of_a_conversion_shows_both_jobs(machine):
    env = machine | {"DRY_RUN": "1", "PARTS": "3", "CPUS": "8", "SBATCH_ACCOUNT": "physics"}
    code, out, err = run("shard.sbatch", [env["RECIPE"], "--resize", "64"], env)
    words = f"launch/shard.sbatch {env['RECIPE']} --resize 64"
    command = f"{env['PYTHON']} -m dist_train shard {env['RECIPE']} --resize 64"
    assert code == 0, err
    assert out.splitlines() == [
        "SBATCH_ACCOUNT=physics",
        f"sbatch --parsable --array=0-2 --cpus-per-task=8 {words}",
        f"{command} --workers 8 --part PART/3",
        f"sbatch --dependency=afterok:ARRAY --parsable --kill-on-invalid-dep=yes --export=ALL,PARTS=join {words}",
        f"{command} --join",
    ]


def test_a_dry_run_of_a_study_shows_the_array_and_a_tasks_command(machine):
    env = machine | {"DRY_RUN": "1", "TASKS": "16", "AT_ONCE": "4", "GPUS": "1", "CPUS": "8", "SBATCH_ACCOUNT": "physics"}
    code, out, err = run("study.sbatch", [env["RECIPE"], "--trials", "9"], env | {"TIME": "2:00:00"})
    assert code == 0, err
    assert out.splitlines() == [
        "SBATCH_ACCOUNT=physics",
        f"sbatch --array=0-15%4 --cpus-per-task=8 --gpus-per-node=1 --time=2:00:00 launch/study.sbatch {env['RECIPE']} --trials 9",
        f"ACCELERATE_USE_CPU=false {env['PYTHON']} -m dist_train study {env['RECIPE']} --trials 9",
    ]
    code, out, err = run("study.sbatch", [env["RECIPE"]], machine | {"DRY_RUN": "1"})
    assert code == 0, err
    assert out.splitlines()[0] == f"sbatch --array=0-3%4 --cpus-per-task=1 launch/study.sbatch {env['RECIPE']}"
    assert out.splitlines()[1].startswith("ACCELERATE_USE_CPU=true ")
    assert not Path(env["LOG"], "rank").exists()


@pytest.mark.parametrize("words, extra, complaint", [
    (["nowhere.yaml"], {}, "there is no such file"), (["RECIPE"], {"TASKS": "many"}, "TASKS is many, AT_ONCE many, CPUS 1"),
    (["RECIPE"], {"GPUS": "8"}, "GPUS is 8; expected 0 or 1"),
])  # fmt: skip
def test_an_array_that_cannot_run_says_why(machine, words, extra, complaint):
    code, _, err = run("study.sbatch", [machine.get(word, word) for word in words], machine | {"DRY_RUN": "1"} | extra)
    assert code == 2 and complaint in err


@pytest.mark.parametrize("number, code, requeued", [(signal.SIGUSR1, 85, True), (signal.SIGUSR1, 138, True),
                                                    (signal.SIGUSR1, 0, False), (signal.SIGTERM, 85, False)])  # fmt: skip
def test_a_warned_task_of_an_array_queues_itself_again_and_no_other(machine, number, code, requeued):
    word = "USR1" if number == signal.SIGUSR1 else "TERM"
    env = machine | {
        "SLURM_JOB_ID": "77", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3", "SLURM_GPUS_ON_NODE": "1",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "DO": f'trap "echo {word} >> $LOG/signals; exit {code}" {word}; touch "$LOG/trapped"; while true; do sleep 0.05; done',
    }  # fmt: skip
    with start("study.sbatch", [env["RECIPE"], "--trials", "9"], env) as process:
        await_files(env, "trapped")
        process.send_signal(number)
        process.communicate(timeout=30)
    assert process.returncode == code
    given = Path(env["LOG"], "rank").read_text().split()
    assert given == [":", "false", "-m", "dist_train", "study", env["RECIPE"], "--trials", "9"]
    assert Path(env["LOG"], "signals").read_text().split() == [word]
    asked = Path(env["LOG"], "scontrol")
    assert (asked.read_text() if asked.exists() else "") == ("requeue 77_3\n" if requeued else "")


def in_job(machine, tasks="2"):
    return machine | {
        "SLURM_JOB_ID": "12345", "SLURM_NNODES": "2", "SLURM_NTASKS": tasks, "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }  # fmt: skip


def test_a_job_gives_every_task_its_rank_and_the_run_folder_of_its_number(machine):
    code, out, err = run("train.sbatch", [machine["RECIPE"], "--seed", "3"], in_job(machine))
    assert code == 0, err
    for rank, given in enumerate(ranks(machine, 2)):
        assert given[:6] == [str(rank), "2", "0", "1", "n1:22345", "true"]
        assert given[6].strip().endswith("--run runs/recipe-12345 --resume --seed 3")
    assert "run folder runs/recipe-12345" in out


@pytest.mark.parametrize("given, expected", [
    ({}, "true"), ({"GPUS_PER_NODE": "4"}, "true"), ({"SLURM_GPUS_ON_NODE": "0"}, "true"), ({"SLURM_GPUS_ON_NODE": "4"}, "false"),
    ({"SLURM_JOB_GPUS": "0"}, "false"),  # the number of a GPU
    ({"ACCELERATE_USE_CPU": "false"}, "false"), ({"SLURM_GPUS_ON_NODE": "4", "ACCELERATE_USE_CPU": "true"}, "true"),
])  # fmt: skip
def test_the_gpus_a_job_holds_decide_unless_the_user_does(machine, given, expected):
    code, out, err = run("train.sbatch", [machine["RECIPE"]], in_job(machine) | {"DRY_RUN": "1"} | given)
    assert code == 0, err
    assert f"ACCELERATE_USE_CPU={expected}" in out
    assert ("as the shell has it" in err) == ("ACCELERATE_USE_CPU" in given)


@pytest.mark.parametrize("code_after_usr1, requeued", [(85, True), (7, False), (0, False)])
def test_a_warned_job_queues_itself_again_if_it_stopped_in_order(machine, code_after_usr1, requeued):
    do = f"trap 'exit {code_after_usr1}' USR1; touch $LOG/trapped$RANK; while true; do sleep 0.05; done"
    env = in_job(machine) | {"DO": do}
    with start("train.sbatch", [env["RECIPE"]], env) as process:
        await_files(env, "trapped0", "trapped1")
        process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=30)
    assert process.returncode == code_after_usr1
    assert asked_of_slurm(env) == ("requeue 12345\n" if requeued else "")


@pytest.mark.parametrize("restart, code, writes, requeued", [
    ("1", 137, True, True), ("1", 86, True, True), ("1", 1, False, False), ("1", 2, True, False), ("1", 0, True, False),
    ("", 137, True, False),
])  # fmt: skip
def test_a_job_that_ends_by_itself_is_queued_again_where_that_is_wished_and_it_came_on(machine, restart, code, writes, requeued):
    checkpoints = Path(machine["LOG"], "run", "checkpoints")
    (checkpoints / "step-00000900").mkdir(parents=True)
    do = f"[[ $RANK == 0 ]] || exit 0; mkdir {checkpoints}/step-00001000{'' if writes else '.partial'}; exit {code}"
    env = in_job(machine) | {"RUN": str(checkpoints.parent), "RESTART": restart, "DO": do}
    found, out, err = run("train.sbatch", [env["RECIPE"]], env)
    assert found == code, err
    assert asked_of_slurm(env) == ("requeue 12345\n" if requeued else "")
    assert (f"ended (exit code {code}): queued again" in out) == requeued


def test_a_job_outlives_the_term_that_its_ranks_answer(machine):
    env = in_job(machine) | {"DO": "sleep 1; exit 85"}
    with start("train.sbatch", [env["RECIPE"]], env) as process:
        ranks(env, 2)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 85
    assert not Path(env["LOG"], "scontrol").exists()


@pytest.mark.parametrize("words, extra, complaint", [
    (["nowhere.yaml"], {}, "no such recipe"), (["RECIPE"], {"SLURM_NTASKS": "3"}, "do not spread evenly"),
    (["RECIPE"], {"LAUNCHER": "mpirun"}, "expected srun or accelerate"),
    (["RECIPE", "--resume"], {}, "--resume: it resumes in any case"), (["RECIPE", "--run", "runs/a"], {}, "RUN=runs/NAME"),
    (["RECIPE", "--run=runs/a"], {}, "RUN=runs/NAME"),
])  # fmt: skip
def test_a_job_that_cannot_run_says_why(machine, words, extra, complaint):
    code, _, err = run("train.sbatch", [machine.get(word, word) for word in words], in_job(machine) | extra)
    assert code == 2 and complaint in err


def test_the_example_of_site_settings_leaves_room_for_the_shell(machine):
    script = f"source {shlex.quote(str(SCRIPTS[2]))}; echo $SBATCH_ACCOUNT $NODES"
    done = subprocess.run(["bash", "-euc", script], env=machine | {"NODES": "5"}, capture_output=True, text=True)
    assert done.stdout.split() == ["my-account", "5"], done.stderr


def test_accelerate_reads_every_configuration_and_none_changes_a_result():
    assert len(ACCELERATE) == 5
    from accelerate.commands.config.config_args import load_config_from_file

    for path in ACCELERATE:
        config = load_config_from_file(str(path))
        raw = yaml.safe_load(path.read_text())
        assert config.num_processes == raw["num_processes"] and config.mixed_precision == "no", path
        several = raw["num_processes"] > 1
        assert (config.distributed_type.value == "MULTI_GPU") == several, f"{path}: accelerate would start one process"
        assert not config.use_cpu, f"{path}: with use_cpu accelerate warns, or lets each process train alone"


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_launch_fills_nothing_in_by_itself(path, caplog):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    args = launch_command_parser().parse_args(["--config_file", str(path), "-m", "dist_train.train"])
    args, _, _ = _validate_launch_command(args)
    assert args.multi_gpu == (args.num_processes > 1)
    assert "defaults used instead" not in caplog.text
