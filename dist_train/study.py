"""Many trainings of one recipe, to find better settings: `dist-train study FILE`.

Any number of processes may work on one study: start the same command on several machines, or launch/study.sbatch on a SLURM
cluster. What is to be done and what came of it lie in Optuna's journal; a trial whose process died is tried again by whoever
comes next.
"""

import argparse
import contextlib
import json
import platform
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash
import yaml

from dist_train import runtime, search
from dist_train.config import RunConfig, StudyConfig, changes_results
from dist_train.errors import UserError
from dist_train.folds import fold_view
from dist_train.index import load_index
from dist_train.journal import MAX_ATTEMPTS, counted_trials, locked, open_journal, queue_blameless, queue_failed
from dist_train.remote import shown
from dist_train.search import Space, changed, check_values, read_space, recipe_with
from dist_train.settings import flatten, option_lines, read_config, to_dict
from dist_train.streams import outlive_readers

FAILURES_IN_A_ROW = 3  # of one process, before it asks whether its machine is at fault, which takes a step and an evaluation


@outlive_readers()
def main(argv: list[str]) -> int:
    """Work on a study until nothing is left to start; then write its report and its best recipe.

    Returns 0, or runtime.EXIT_STOPPED where the process was asked to stop. Raises UserError if no trial could be trained, or
    if this machine trains nothing.
    """
    from dist_train.study_report import write_study_report
    from dist_train.study_wandb import StudyLog

    plan = read_plan(argv)
    refuse_ranks()
    study = open_study(plan)
    log = StudyLog(plan, study)
    num_done, stopped, failed = 0, "", []
    with contextlib.closing(runtime.StopRequests(plan.folder / "trials")) as requests:
        while not stopped:
            with claimed_trial(plan, study) as trial:
                if trial is None:
                    break
                stopped = work_on(plan, study, trial, requests)
                num_done += not stopped
            failed = [*failed, trial.number] if study.get_trials(deepcopy=False)[trial.number].state.name == "FAIL" else []
            if len(failed) == FAILURES_IN_A_ROW and not stopped:
                prove_machine(plan, study, failed, requests)
                failed = []
            stopped = stopped or requests.reason
            if not stopped:
                log.progress()
    with locked(plan.folder / "report.lock"):  # whoever else is done writes the same files
        report = write_study_report(plan, study)
    end = f", stopped by {stopped}" if stopped else ""
    print(f"{plan.folder}: {num_done} trials done here{end}; {report.summary}", flush=True)
    if report.best_recipe:
        print(f"report: {report.page}\nbest:   dist-train train --config {report.best_recipe} --run {plan.folder}-best", flush=True)
    if stopped:
        return runtime.EXIT_STOPPED  # at once: whoever asked may not wait until a server has answered
    log.send(report.page)
    if report.failure:
        raise UserError(f"{plan.folder}: {report.failure}")
    return 0


@dataclass(frozen=True)
class Plan:
    """What a study's file says. shards: what is trained and judged on, so that results of other shards are not taken."""

    path: str
    folder: Path
    config: StudyConfig
    space: Space
    base: RunConfig
    shards: str

    @property
    def journal(self) -> Path:
        return Path(self.config.storage or self.folder / "journal.log")

    def lock(self, name: str) -> Path:
        """Beside the journal, which all processes share; the folder of results may be each machine's own."""
        return self.journal.with_name(f"{self.journal.name}.locks") / f"{self.folder.name}-{name}"

    @property
    def num_trials(self) -> int:
        """Trials over all processes."""
        if self.config.sampler == "grid":
            return min(self.config.trials or 10**9, len(self.space.grid()))
        return self.config.trials or 30

    def trial_config(self, drawn: dict) -> RunConfig:
        config = changed(self.base, self.space.settings(drawn))
        return replace(config, train=replace(config.train, monitor=self.config.metric))

    def trial_folder(self, config: RunConfig) -> Path:
        """One for each set of settings: whoever trains them again finds the folds that are done."""
        settings = sorted((k, v) for k, v in flatten(to_dict(config)).items() if _counts(k))
        name = xxhash.xxh3_64_hexdigest(f"{settings} {self.config.folds} {self.shards}".encode())
        return self.folder / "trials" / name

    def identity(self) -> dict:
        """What must not change while a study lasts; the number of trials, pruning and places may."""
        free = dict.fromkeys(("recipe", "name", "trials", "storage", "prune", "prune_from"))
        config, base = to_dict(self.config) | free, {k: v for k, v in flatten(to_dict(self.base)).items() if _counts(k)}
        space = {"ranges": self.space.ranges, "choices": self.space.choices, "variants": self.space.variants}
        return json.loads(json.dumps({"study": config, "recipe": base, "space": space, "shards": self.shards}))


def read_plan(argv: list[str]) -> Plan:
    """`dist-train study FILE [--run FOLDER] [--trials N ...]` -> Plan. Raises UserError, all faults of a kind at once."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="dist-train study", description=__doc__.splitlines()[0], formatter_class=raw)
    parser.add_argument("file", help="YAML file with a `study:` part and a `search:` or `variants:` part")
    parser.add_argument("--run", help="folder of the results; default runs/NAME")
    if {"-h", "--help"} & set(argv):
        parts = search.__doc__.partition("\n\n")[2]
        parser.epilog = f"{parts}\nThe settings of `study:`, which options may override:\n\n{option_lines(StudyConfig)}"
    options, overrides = parser.parse_known_args(argv)
    path = options.file
    try:
        tree = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot read the study: {getattr(error, 'strerror', None) or error}") from None
    parts = {"study", "search", "variants"}
    unknown = sorted(map(str, set(tree) - parts)) if isinstance(tree, dict) else [str(tree)[:20]]
    if unknown or not isinstance(tree.get("study"), dict):
        raise UserError(f"{path}: expected the parts study, search and variants; found {', '.join(unknown) or 'no study'}.")
    words = [f"--{name}={value}" for name, value in tree["study"].items()]
    try:
        read_config(StudyConfig, words, "dist-train study")
    except UserError as error:
        raise UserError(str(error).replace("command line: ", f"{path}: study.")) from None
    words += [word.replace("--study.", "--") for word in overrides]
    config = read_config(StudyConfig, words, "dist-train study")
    if not Path(config.recipe).is_file():
        raise UserError(f"{path}: study.recipe is {config.recipe!r}, which is no file; expected a recipe's path.")
    if config.folds == 1 or config.folds < 0 or config.trials < 0:
        raise UserError(f"{path}: study.folds is {config.folds} and study.trials {config.trials}; expected 0, or folds from 2 "
                        f"and trials from 1.")  # fmt: skip
    if "://" in config.storage:
        raise UserError(f"{path}: study.storage is {shown(config.storage)!r}; expected the path of a journal, a file on a disk "
                        f"that all processes share, such as /shared/tune.log.")  # fmt: skip
    if not 0 <= config.prune_from <= 1:
        raise UserError(f"{path}: study.prune_from is {config.prune_from}; expected a share of a training, 0 to 1.")
    space = read_space(path, tree.get("search") or {}, tree.get("variants") or {}, config.sampler)
    base = recipe_with(config.recipe, {})
    if not base.data.shards:
        raise UserError(f"{config.recipe}: data.shards is not set; a study's recipe has to name its shards.")
    index = load_index(base.data.shards, base.data.cache_dir, base.data.cache_gb)
    if config.folds:
        fold_view(index, replace(base, data=replace(base.data, folds=config.folds)))
    elif index.find(base.data.val_split) is None:
        raise UserError(f"{shown(base.data.shards)}: there is no split {base.data.val_split!r} to compare on; set study.folds, "
                        f"to 5 say.")  # fmt: skip
    check_values(path, config.recipe, space)
    folder = Path(options.run or f"runs/{config.name or Path(path).stem}")
    splits = [base.data.train_split, *([] if config.folds else [base.data.val_split])]
    return Plan(path, folder, config, space, base, "+".join(index.split(name).fingerprint() for name in splits))


def refuse_ranks() -> None:
    if runtime.num_launched() > 1:
        raise UserError("a study's trainings each take one process, and this job has several ranks.\n"
                        "  Start `dist-train study` without a launcher, as often as you like: all work on one study.")  # fmt: skip


def open_study(plan: Plan):
    """The Optuna study in the plan's journal, made if it is not there; every combination of a grid is queued.

    Raises UserError if the folder holds another study.
    """
    optuna = _optuna()
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        plan.lock("").parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{plan.folder}: cannot be made the folder of a study: {error.strerror}.") from None
    with locked(plan.lock("claim")):
        storage = optuna.storages.JournalStorage(open_journal(plan.journal))
        direction = "minimize" if plan.config.metric == "loss" else "maximize"
        study = optuna.create_study(storage=storage, study_name=plan.folder.name, direction=direction, load_if_exists=True)
        before, now = study.user_attrs.get("identity"), plan.identity()
        if before is None:
            study.set_user_attr("identity", now)
        else:
            old, new = ({k: v for k, v in flatten(tree).items() if _counts(k.removeprefix("recipe."))} for tree in (before, now))
            usual = flatten(json.loads(json.dumps({"recipe": to_dict(RunConfig())})))  # of settings that were not there then
            names = [k for k in sorted(old.keys() | new.keys()) if old.get(k, usual.get(k)) != new.get(k, usual.get(k))]
            if names:
                raise UserError(f"{plan.folder}: the folder holds another study; these differ: {', '.join(names)}.\n"
                                f"  Take another folder with --run, or put them back.")  # fmt: skip
        queue_failed(study)
        if plan.config.sampler == "grid":  # what is missing, also where a start was cut short or there are to be more trials
            known = [trial.system_attrs.get("fixed_params", trial.params) for trial in counted_trials(study)]
            for drawn in plan.space.grid()[: plan.num_trials]:
                if drawn not in known:
                    study.enqueue_trial(drawn)
    return study


@contextlib.contextmanager
def claimed_trial(plan: Plan, study):
    """Yield the next trial to train, its settings drawn; None if there is nothing left to start.

    One process at a time claims. The trial's lock is held until the block ends; the kernel lets go of it if the process dies.
    """
    optuna = _optuna()
    with contextlib.ExitStack() as holding:
        with locked(plan.lock("claim")):
            queue_abandoned(plan, study)
            trials = counted_trials(study)
            queued = [t for t in trials if t.state == optuna.trial.TrialState.WAITING]
            trial = None
            if queued or (plan.config.sampler != "grid" and len(trials) < plan.num_trials):
                study.sampler = sampler(plan, len(study.get_trials(deepcopy=False)))
                study.pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=round(100 * plan.config.prune_from))
                trial = study.ask()
                holding.enter_context(locked(plan.lock(f"{trial.number:05d}")))
                plan.space.draw(trial)
        yield trial


def queue_abandoned(plan: Plan, study) -> None:
    """Queue anew the trials whose processes have died: they stand as running, but nobody holds their locks."""
    optuna = _optuna()
    names = plan.space.ranges.keys() | plan.space.categories.keys()
    for dead in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        try:
            with locked(plan.lock(f"{dead.number:05d}"), wait=False) as is_held:
                if not is_held:
                    return  # nobody can tell the dead from the living
                if study.get_trials(deepcopy=False)[dead.number].state.is_finished():
                    continue  # it has just come to its end
                attempt = dead.user_attrs.get("attempt", 1)
                trial = optuna.trial.Trial(study, dead._trial_id)
                if "abandoned" in dead.user_attrs:  # whoever queued it anew was killed before this
                    study.tell(dead.number, state=optuna.trial.TrialState.FAIL)
                elif attempt >= MAX_ATTEMPTS:
                    trial.set_user_attr("why", f"its process died {attempt} times")
                    study.tell(dead.number, state=optuna.trial.TrialState.FAIL)
                else:
                    drawn = dead.system_attrs.get("fixed_params", dead.params)
                    queue_again(study, trial, drawn if names <= drawn.keys() else None, attempt + 1)
        except BlockingIOError:
            pass  # alive


def queue_again(study, trial, drawn: dict | None, attempt: int) -> None:
    """End a running trial and queue its settings anew; None where its process died before it had drawn them all."""
    trial.set_user_attr("abandoned", True)
    if drawn is not None:
        study.enqueue_trial(drawn, user_attrs={"attempt": attempt})
    study.tell(trial.number, state=_optuna().trial.TrialState.FAIL)


def work_on(plan: Plan, study, trial, requests: runtime.StopRequests) -> str:
    """Train a trial and tell Optuna; returns why the process was asked to stop, or "" if it was not."""
    import torch

    from dist_train.study_report import described
    from dist_train.trial import Diverged, Stopped, mean_figures, run_trial

    optuna = _optuna()
    config, metric, newest = plan.trial_config(trial.params), plan.config.metric, -1
    folder = plan.trial_folder(config)
    trial.set_user_attr("folder", str(folder.relative_to(plan.folder)))

    def watch(place: float, figures: dict) -> None:
        nonlocal newest
        percent = round(100 * place)  # of a fold; the median of the others is taken at the same place
        if percent <= newest or figures[metric] is None:
            return
        newest = percent
        if not plan.config.prune or percent >= 100 * max(1, plan.config.folds):  # all of it is trained: its figure counts
            return
        trial.report(figures[metric], percent)
        if trial.should_prune():
            raise optuna.TrialPruned

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with trial_folder_lock(folder / "lock", requests):
            results = run_trial(config, plan.config.folds, folder, watch, requests)
        value = mean_figures(results)[metric]
        if value is None:
            raise Diverged("a training has no evaluation whose loss is finite")
    except Stopped as stop:
        with locked(plan.lock("claim")):
            queue_again(study, trial, trial.params, trial.user_attrs.get("attempt", 1))
        return str(stop) or "a request"
    except optuna.TrialPruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        print(f"trial {trial.number:<4} pruned   {described(trial.params)}", flush=True)
    except Diverged as error:  # not a failure, of which a sampler learns nothing
        trial.set_user_attr("why", str(error))
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        print(f"trial {trial.number:<4} diverged {described(trial.params)}: {str(error).splitlines()[0]}", flush=True)
    except (UserError, OSError, torch.OutOfMemoryError, torch.AcceleratorError) as error:  # others may be trained
        trial.set_user_attr("why", str(error))
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        first, *more = str(error).splitlines() or [type(error).__name__]
        why = f"{first} {more[0].strip()}" if first.endswith(":") and more else first
        print(f"trial {trial.number:<4} failed   {described(trial.params)}: {why}", flush=True)
    else:
        trial.set_user_attr("folds", results)
        study.tell(trial, value)
        seconds = sum(result["train_s"] for result in results)
        print(f"trial {trial.number:<4} {metric} {value:.4f}  {seconds:6.1f} s   {described(trial.params)}", flush=True)
    return ""


def prove_machine(plan: Plan, study, failed: list[int], requests: runtime.StopRequests) -> None:
    """After trials have failed in a row: train what can be trained, to see whether it is their settings or this machine.

    It is trained for a step: a trial that was trained to its end, wherever that was, or else the recipe as it stands. Raises
    UserError if that fails too; the failed trials are queued anew, so that a full disk or a broken GPU uses up nobody's tries.
    """
    import torch

    from dist_train.trial import Diverged, Stopped, let_go_of_trainings, try_out

    done = study.get_trials(deepcopy=False, states=(_optuna().trial.TrialState.COMPLETE,))
    known = f"trial {done[-1].number}, which was trained before," if done else f"{plan.config.recipe} as it stands"
    config = plan.trial_config(done[-1].params) if done else plan.base
    let_go_of_trainings()
    try:
        with tempfile.TemporaryDirectory(prefix="control-", dir=plan.folder, ignore_cleanup_errors=True) as folder:
            try_out(config, plan.config.folds, Path(folder), requests)
    except (Stopped, Diverged):
        return
    except (UserError, OSError, torch.OutOfMemoryError, torch.AcceleratorError) as error:
        with locked(plan.lock("claim")):
            queue_blameless(study, failed)
        raise UserError(
            f"{plan.folder}: {len(failed)} trials in a row have failed on {platform.node()}, and {known} cannot be trained there "
            f"either. The last reason:\n  {error}\n"
            f"  Put that right and start again. The trials are queued anew, and have used up none of their tries."
        ) from error
    print(f"{len(failed)} trials in a row have failed for their settings: {known} can be trained here. Going on with the others.",
          flush=True)  # fmt: skip


@contextlib.contextmanager
def trial_folder_lock(path: Path, requests: runtime.StopRequests):
    """`locked`, for which one may wait as long as a trial lasts: two may have drawn the same settings. Raises Stopped."""
    from dist_train.trial import Stopped

    with contextlib.ExitStack() as holding:
        while True:
            try:
                holding.enter_context(locked(path, wait=False))
                break
            except BlockingIOError:
                if requests.reason:
                    raise Stopped(requests.reason) from None
                time.sleep(0.5)
        yield


def sampler(plan: Plan, number: int):
    """The sampler of one draw: seeded by the draw's number, so that processes never draw the same."""
    optuna = _optuna()
    seed = int(xxhash.xxh3_64_intdigest(f"{plan.config.seed} {number}".encode()) >> 32)
    if plan.config.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(10, max(3, plan.num_trials // 3)))
    return optuna.samplers.RandomSampler(seed=seed)


def _counts(name: str) -> bool:
    """Whether a setting tells one trial, or study, from another: the shards do so by what is in them."""
    return changes_results(name) and name != "data.shards"


def _optuna():
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
