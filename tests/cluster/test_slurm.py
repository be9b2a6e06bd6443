"""Jobs on a real SLURM of three nodes: pushed out, warned, or struck by a power cut, they end as if nothing had been."""
# ruff: noqa: F811

import re
from pathlib import Path

import pytest
import yaml
from clusters import slurm, wait_for  # noqa: F401
from conftest import figures, run_to_end, same_tensors, tiny_run

from dist_train.track import read_metrics

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
MORE = ["--train.epochs", "10", "--train.eval_every_epochs", "4", "--runtime.timeout_s", "30"]


def steps_of(run, kind):
    return [line["step"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == kind]


def restarts_of(run):
    return [step for step in steps_of(run, "restart") if step]  # 0: stopped before its first checkpoint


@pytest.fixture(scope="module")
def calm(digits, tmp_path_factory):
    """The same training on two ranks, undisturbed."""
    folder = tmp_path_factory.mktemp("calm")
    run_to_end(2, tiny_run(digits, folder / "run", *MORE), folder)
    return folder / "run"


class Job:
    """A training submitted to SLURM on two nodes, waited for until it is in the middle."""

    def __init__(self, slurm, digits, folder, *argv, sbatch=(), **env):
        self.slurm, self.folder, self.run = slurm, folder, folder / "run"
        recipe = folder / "recipe.yaml"
        recipe.write_text("seed: 0\n")
        settings = tiny_run(digits, self.run, *MORE, *argv)
        at = settings.index("--run")
        del settings[at : at + 2]
        self.id = slurm.run(
            "ctl", "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={folder}/job.out", *sbatch,
            "launch/train.sbatch", str(recipe), *settings, RUN=str(self.run), **env,
        ).strip()  # fmt: skip

    def log(self):
        path = self.folder / "job.out"
        return f"{self.slurm.state(self.id)}: {path.read_text()[-3000:] if path.exists() else 'no output'}"

    def reach(self, num_steps):
        wait_for(lambda: len(steps_of(self.run, "train")) >= num_steps, self.log)

    def finish(self):
        wait_for(lambda: self.slurm.state(self.id) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), self.log)
        assert self.slurm.state(self.id) == "COMPLETED", self.log()


def assert_same_run(run, calm, num_restarts=1):
    restarts = restarts_of(run)
    assert len(restarts) == num_restarts
    assert figures(run) == figures(calm)  # every step once, every figure to the last digit
    assert same_tensors(run, calm)
    return restarts


def test_a_job_that_is_pushed_out_goes_on_where_it_was(slurm, digits, calm, tmp_path):
    job = Job(slurm, digits, tmp_path, "--track.wandb", "offline", "--track.project", "cluster-test", WANDB_MODE="offline")
    job.reach(5)
    slurm.run("ctl", "sbatch", "-p", "urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    wait_for(lambda: slurm.state(job.id) != "RUNNING", job.log)
    job.finish()
    (step,) = assert_same_run(job.run, calm)
    assert step >= 5, "the step it was stopped at was saved; no checkpoint was due before"
    ids = {path.stem.rpartition("-")[2] for path in job.run.rglob("run-*.wandb")}
    assert len(ids) == 1, "one W&B run a job"


@pytest.mark.parametrize("launcher", ["srun", "accelerate"])
def test_a_warned_job_queues_itself_again(slurm, digits, calm, tmp_path, launcher):
    job = Job(slurm, digits, tmp_path, LAUNCHER=launcher)
    job.reach(5)
    for _ in range(2):  # signals come twice
        slurm.run("ctl", "scancel", "--signal=USR1", "--batch", job.id)
    wait_for(lambda: slurm.state(job.id) != "RUNNING", job.log)
    job.finish()
    (step,) = assert_same_run(job.run, calm)
    assert step >= 5


def test_a_job_near_its_time_limit_is_warned_by_slurm_itself_and_goes_on(slurm, digits, tmp_path):
    endless = ["--train.epochs", "10000", "--train.eval_every_epochs", "0", "--train.checkpoint_every_steps", "0"]
    job = Job(slurm, digits, tmp_path, *endless, sbatch=["--time=2", "--signal=B:USR1@20"])  # may come a minute early
    wait_for(lambda: restarts_of(job.run), job.log)
    step = restarts_of(job.run)[0]
    assert f"stopped at step {step:,} (SIGUSR1)" in job.log() and "queued again" in job.log()
    wait_for(lambda: len(steps_of(job.run, "train")) >= step + 3, job.log)
    slurm.run("ctl", "scancel", job.id)
    wait_for(lambda: slurm.state(job.id) == "CANCELLED", job.log)
    steps = steps_of(job.run, "train")
    assert steps == list(range(1, len(steps) + 1))
    assert "TIME LIMIT" not in job.log()


def test_a_conversion_in_an_array_of_jobs_is_that_of_one_machine(slurm, tmp_path):
    from test_shard import all_bytes, config_for, make_folder

    from dist_train.convert import convert

    make_folder(tmp_path / "raw", per_class=40)
    config = config_for(tmp_path, out=str(tmp_path / "whole/set"), shard_mb=0.01, workers=1)
    dataset, out, log = tmp_path / "set.yaml", tmp_path / "shards/set", tmp_path / "job.out"
    dataset.write_text(f"path: {config.path}\nout: {out}\nsplit: {{val: {config.split.val}, test: {config.split.test}}}\n"
                       f"shard_mb: {config.shard_mb}\n")  # fmt: skip
    join = slurm.run("ctl", "launch/shard.sbatch", str(dataset), PARTS="3", SBATCH_OUTPUT=str(log)).strip()
    wait_for(lambda: slurm.state(join) == "COMPLETED", lambda: log.read_text() if log.exists() else "the first part")
    assert all_bytes(out) == all_bytes(Path(convert(config).folder))


@pytest.mark.parametrize("warned", [False, True])
def test_a_study_in_an_array_of_two_tasks_does_every_trial_once(slurm, digits, tmp_path, warned):
    from dist_train.study import open_study, read_plan

    rates = [round(0.004 * k, 3) for k in range(1, 9)]
    recipe = {
        "data": {"shards": digits, "image_size": 16, "global_batch_size": 96, "threads": 1}, "track": {"wandb": "off"},
        "model": {"name": "alexnet_bn", "width": 0.0625}, "train": {"epochs": 3.0}, "runtime": {"threads": 1},
    }  # fmt: skip
    study = {"recipe": str(tmp_path / "base.yaml"), "sampler": "grid", "folds": 2, "prune": False}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump({"study": study, "search": {"optim.lr": rates}}))
    argv = [str(tmp_path / "tune.yaml"), "--run", str(tmp_path / "run")]
    # no --parsable: it says "Submitted batch job 12"
    job = slurm.run("ctl", "launch/study.sbatch", *argv, TASKS="2", SBATCH_OUTPUT=f"{tmp_path}/%a.out").split()[-1]

    def states():
        return re.findall(r"JobState=(\w+)", slurm.run("ctl", "scontrol", "show", "job", job))

    def logs():
        return f"{states()}: " + "\n".join(path.read_text()[-3000:] for path in sorted(tmp_path.glob("*.out")))

    if warned:
        wait_for(lambda: list(tmp_path.glob("run/trials/*/fold-1/metrics.jsonl")), logs)
        slurm.run("ctl", "scancel", "--signal=USR1", "--batch", f"{job}_0")
        wait_for(lambda: "queued again" in logs(), logs)
    wait_for(lambda: states() == ["COMPLETED"] * 2, logs)
    trials = open_study(read_plan(argv)).get_trials()
    done = [t for t in trials if t.state.name == "COMPLETE"]
    assert sorted(t.params["optim.lr"] for t in done) == rates, logs()
    assert all(t.user_attrs.get("attempt", 1) == 1 for t in done), "no process died"
    stopped = [t.state.name for t in trials if t not in done]
    assert stopped in ([], ["FAIL"] * warned), "what was stopped, unless it was between two, was queued under another number"
    ended = [[int(n) for n in re.findall(r"(\d+) trials done here", (tmp_path / f"{k}.out").read_text())] for k in range(2)]
    assert sum(map(sum, ended)) == len(rates) and (warned or all(map(sum, ended))), logs()
    assert [len(ends) for ends in ended] == [1 + warned, 1]
    assert f"{len(rates)} finished" in (tmp_path / "run/report.html").read_text()


def test_a_signal_to_the_ranks_alone_queues_the_job_again_and_a_stop_file_does_not(slurm, digits, tmp_path):
    job = Job(slurm, digits, tmp_path)
    job.reach(5)
    slurm.run("ctl", "scancel", "--signal=USR1", job.id)
    wait_for(lambda: slurm.state(job.id) == "PENDING", job.log)
    job.reach(len(steps_of(job.run, "train")) + 3)
    (job.run / "stop").touch()
    wait_for(lambda: slurm.state(job.id) in ("FAILED", "COMPLETED"), job.log)
    assert slurm.state(job.id) == "FAILED" and "(the file" in job.log()
    assert not (job.run / "result.json").exists()


def test_a_job_goes_on_on_other_nodes_after_a_power_cut(slurm, digits, calm, tmp_path):
    job = Job(slurm, digits, tmp_path, "--train.checkpoint_every_steps", "5")
    job.reach(12)
    slurm.fault("node2", "power")
    wait_for(lambda: restarts_of(job.run), job.log)
    job.finish()
    assert_same_run(job.run, calm)
    assert "on node[1,3]" in (tmp_path / "job.out").read_text()
