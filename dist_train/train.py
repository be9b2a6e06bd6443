"""Training: the loop, then how it is started.

accelerate launch --config_file accelerate_config.yaml -m dist_train.train --config recipes/digits-alexnet.yaml
"""

import contextlib
import sys
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dist_train import branch, messages, ranks, runtime
from dist_train.checkpoint import load_checkpoint, wait_until_shown, write_tensors
from dist_train.config import RunConfig
from dist_train.data import Batch, to_device
from dist_train.decoder_choice import choose_decoder
from dist_train.durable import put_in_place, replace_json
from dist_train.errors import UserError
from dist_train.evaluate import Interrupted, write_evaluation
from dist_train.finetune import freeze_below_head
from dist_train.index import load_index
from dist_train.layers import set_dropout_keys
from dist_train.loss import weighted_cross_entropy
from dist_train.metrics import Throughput, goodness
from dist_train.optim import lr_at, set_lr
from dist_train.order import hash_words
from dist_train.remote import shown
from dist_train.run import Run
from dist_train.run_folder import has_begun, inference, open_run_folder
from dist_train.settings import read_config
from dist_train.sizes import config_warnings, pretrained_remarks, split_warnings
from dist_train.state import State
from dist_train.step_parts import StepParts
from dist_train.streams import outlive_readers
from dist_train.track import open_tracker
from dist_train.watch import Watch


def train(run: Run, state: State) -> None:
    """Train from state.step until the last step, an early stop or a request to stop; evaluate and save on the way."""
    config, world = run.config, run.world
    if run.is_evaluation_due(state):  # a request to stop came before its end
        validate_and_save(run, state)
    if run.is_evaluation_due(state) or run.is_over(state) or state.step >= run.halt_step:
        return run.checkpoints.wait_together(run.world)
    clock = Throughput()
    for batch in timed(to_device(run.stream(state.step), world.device), clock, run.parts):
        if not run.parallel.is_settled and state.step >= run.freeze_steps:
            settle_messages(run, batch)
            clock.read()
        lr = lr_at(state.step, config.optim, run.steps_per_epoch, run.num_steps) * state.plateau.factor
        set_lr(state.optimizer, lr)
        torch.manual_seed(int(hash_words(config.seed, state.step, world.rank)) >> 1)  # for layers that draw by themselves
        loss = forward_backward(run, batch)
        asked = run.agree_to_stop(state, loss)
        run.parts.mark("optimizer")
        if config.optim.clip_norm:
            run.parallel.clip_gradients(config.optim.clip_norm)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        run.parallel.agree_on_statistics()
        state.step += 1
        if state.average:
            state.average.update(run.network)
        state.loss_sum += loss
        run.parts.mark("other")
        clock.add(config.data.global_batch_size)

        stop = asked or state.step >= run.halt_step
        last = state.step >= run.num_steps
        if its_time(state.step, config.train.log_every_steps) or last:
            run.check_loss()
            if config.data.max_bad:
                run.name_bad_samples()
            mean_loss = run.mean_over_ranks(state.loss_sum) / (state.step - state.logged_step)
            images_per_s, data_wait = clock.read()
            figures = run.work_figures(images_per_s, state.step - 1) if world.is_main else {}
            run.tracker.train(state.step, {"epoch": run.epoch_of(state.step), "loss": mean_loss, "lr": lr,
                                           "images_per_s": images_per_s, "data_wait": data_wait, **figures})  # fmt: skip
            if run.parts.is_complete:
                run.tracker.profile(state.step, run.parts.step_s(), run.parts.shares())
            state.loss_sum, state.logged_step = torch.zeros_like(state.loss_sum), state.step
        if run.is_evaluation_due(state) and not asked:
            run.parts.pause()
            validate_and_save(run, state)
            stop = stop or run.is_evaluation_due(state) or run.is_over(state)
            clock.read()  # neither evaluation nor saving is training time
        elif stop or its_time(state.step, config.train.checkpoint_every_steps):
            run.parts.pause()
            run.save(state, is_best=False)
            clock.read()
        if last or stop:
            break
    run.checkpoints.wait_together(run.world)


def forward_backward(run: Run, batch: Batch) -> torch.Tensor:
    """Accumulate the gradient of this rank's share, in micro-batches; return its mean loss, () float32 on the device."""
    run.model.train()
    is_frozen = batch.step < run.freeze_steps
    if run.freeze_steps:
        freeze_below_head(run.network, run.head, is_frozen)
    smoothing = run.config.optim.label_smoothing
    num_micro = len(batch) // run.micro_batch_size
    loss_sum = torch.zeros((), device=run.world.device)
    for i in range(num_micro):
        run.parts.mark("augment")
        part = slice(i * run.micro_batch_size, (i + 1) * run.micro_batch_size)
        inputs, targets = run.prepare(batch.images[part], batch.labels[part], batch.random_keys[part])
        if run.progressive:
            inputs = run.progressive(inputs, batch.step)
        run.parts.mark("forward")
        set_dropout_keys(run.network, batch.random_keys[part])
        if run.parallel.replays_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # what the graphs of the pass before wrote is not needed any more
        is_synced = i == num_micro - 1 and not is_frozen
        with contextlib.nullcontext() if is_synced else run.parallel.accumulating():
            with run.accelerator.autocast():
                logits = run.model(inputs)
            if run.class_weights is not None:
                loss = weighted_cross_entropy(logits.float(), targets, run.class_weights, smoothing)
            else:
                loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
            run.parts.mark("backward")
            run.accelerator.backward(loss / num_micro)
        messages.clock.backward_is_over()
        loss_sum += loss.detach() / num_micro
    if is_frozen and run.world.world_size > 1:
        # DistributedDataParallel would have to be made anew when the weights that are trained change
        messages.average_over_ranks([p.grad for p in run.network.parameters() if p.grad is not None])
    run.parallel.reduce_gradients()
    return loss_sum


def settle_messages(run: Run, batch: Batch) -> None:
    """Go through a batch and forget it: DistributedDataParallel lays its messages out anew after the first one.

    From three ranks on, the layout decides in which order gradients are summed: without this, the first step after a resume
    would differ from the same step of a run that was not stopped, in the last bits.
    """
    before = [buffer.clone() for buffer in run.network.buffers()]
    run.parts.pause()
    parts, run.parts = run.parts, run.new_parts(0)
    forward_backward(run, batch)
    run.parts, run.parallel.is_settled = parts, True
    run.optimizer.zero_grad(set_to_none=True)
    for buffer, value in zip(run.network.buffers(), before, strict=True):
        buffer.copy_(value)


def validate_and_save(run: Run, state: State) -> None:
    """Judge the weights and save; where a request to stop breaks it off, save as it was before: the evaluation stays due."""
    try:
        is_best = validate(run, state)
    except Interrupted:
        is_best = False
    run.save(state, is_best)


def validate(run: Run, state: State) -> bool:
    """Evaluate on the validation split, tell the plateau schedule, and say whether these weights are the best so far.

    Raises Interrupted, with the state as it was, if the run is asked to stop meanwhile.
    """
    if run.index.find(run.config.data.val_split) is None:
        state.judged_step = state.step
        return True  # nothing to compare with: the newest is the best
    with state.average.swapped(run.network) if state.average else contextlib.nullcontext():
        result = run.evaluate(run.config.data.val_split, confusion=False).result
    figures = {"epoch": run.epoch_of(state.step), **result.figures()}
    run.tracker.evaluation(state.step, run.config.data.val_split, figures)
    state.judged_step = state.step
    value = goodness(result.top1, result.loss, run.config.train.monitor, result.balanced)
    is_best = state.best_value is None or value > state.best_value
    state.best_value, state.bad_evaluations = (value, 0) if is_best else (state.best_value, state.bad_evaluations + 1)
    if run.config.optim.schedule == "plateau":
        state.plateau.update(value[0])
    return is_best


def timed(batches, clock: Throughput, parts: StepParts):
    """Pass batches on; the clock counts the time in which none was ready."""
    while True:
        parts.mark("data")
        with clock.waiting():
            batch = next(batches, None)
        parts.mark("other")
        if batch is None:
            return
        yield batch


def its_time(step: int, period: int) -> bool:
    """True once every `period` steps; a period of 0 is never."""
    return period > 0 and step % period == 0


def finish(run: Run, state: State) -> bool:
    """Best weights -> weights.safetensors, inference.json, and the final figures on the test split.

    False if a request to stop breaks it off; a restart begins it again.
    """
    config, index, folder = run.config, run.index, run.folder
    best_step = ranks.on_main(run.world, keep_best_weights, run, "ema" if state.average else "model")
    run.load_weights(load_file(folder / "weights.safetensors"))
    figures = {"step": state.step, "epoch": run.epoch_of(state.step), "best_step": best_step}
    for split in dict.fromkeys((config.data.val_split, config.data.test_split)):
        if index.find(split):
            try:
                evaluation = run.evaluate(split)
            except Interrupted:
                return False
            figures[split] = evaluation.result.figures()
            if run.world.is_main:
                write_evaluation(folder, evaluation, index.split(split).fingerprint())
                if split != config.data.val_split:  # whose figures stand in the curve already
                    run.tracker.evaluation(state.step, split, evaluation.result.figures())
    if run.world.is_main:
        if (folder / "bad-samples.txt").exists():
            figures["bad_samples"] = (folder / "bad-samples.txt").read_text().splitlines()
        replace_json(folder / "result.json", figures)
        if run.tracker.takes_figures:
            from dist_train.figures import draw_figures  # here: matplotlib takes a second

            drawn, complaints = draw_figures(folder, index)
            run.tracker.figures(drawn)
            for complaint in complaints:
                run.tracker.message(complaint)
    ranks.meet(run.world)  # launchers end the others soon after the first has left
    return True


def keep_best_weights(run: Run, kind: str) -> int:
    """Best checkpoint -> weights.safetensors, inference.json, and its step. kind: "ema" for the averaged weights, or "model"."""
    folder, best = run.folder, run.checkpoints.best_path()
    if best is None:
        raise UserError(f"{folder}/checkpoints: best.json names no checkpoint that is there, so there are no weights to keep.\n"
                        f"  Put it right ({{\"checkpoint\": \"step-...\"}}), and finish with --resume.")  # fmt: skip
    try:
        saved = load_checkpoint(best)
        write_tensors(folder / "weights.safetensors.partial", saved.tensors[kind])
        put_in_place(folder / "weights.safetensors.partial", folder / "weights.safetensors")
        replace_json(folder / "inference.json", inference(run.config, run.index, run.input_size))
    except OSError as error:
        raise UserError(f"{folder}: the best weights cannot be written: {error.strerror}.\n"
                        f"  Make room or mend the disk, then finish with --resume.") from error  # fmt: skip
    return saved.step


def parse(argv: list[str]) -> tuple[RunConfig, Path, bool]:
    """(settings, run folder, resume) of `--config R [--run runs/NAME] [--resume] [--SECTION.KEY VALUE ...]`."""
    argv, resume = list(argv), False
    if "--resume" in argv:
        argv.remove("--resume")
        resume = True
    run = taken_out(argv, "--run")
    config = read_config(RunConfig, argv, "dist-train train", epilog=(
        "Besides these: --run FOLDER, where the run lies (default runs/<the recipe's name>); --resume, which goes on from the "
        "newest whole checkpoint there, if there is one; --from RUN or --from RUN/checkpoints/step-N, by which a new run begins "
        "from the newest checkpoint of another, or from that one, with the settings given here."
    ))  # fmt: skip
    if not config.data.shards:
        raise UserError("data.shards is not set: --data.shards shards/NAME, or a recipe that sets it (--config recipes/R.yaml).")
    recipes = [Path(argv[i + 1]).stem for i, word in enumerate(argv[:-1]) if word == "--config"]
    recipes += [Path(word.partition("=")[2]).stem for word in argv if word.startswith("--config=")]
    return config, Path(run or f"runs/{recipes[0] if recipes else Path(shown(config.data.shards)).name}"), resume


def taken_out(argv: list[str], option: str) -> str | None:
    """Take `option FOLDER` or `option=FOLDER` out of argv; return the folder, or None where it is not there."""
    for i, word in enumerate(argv):
        if word == option or word.startswith(f"{option}="):
            width = 1 if "=" in word else 2
            folder = word.partition("=")[2] or "".join(argv[i + 1 : i + width])
            if not folder:
                raise UserError(f"command line: {option} has no value; expected a folder, such as runs/first.")
            del argv[i : i + width]
            return folder
    return None


@outlive_readers()
def run_training(argv: list[str]) -> int:
    """`dist-train train`: returns 0 when the run is finished, runtime.EXIT_STOPPED when it was asked to stop."""
    argv = list(argv)
    source = Path(word) if (word := taken_out(argv, "--from")) else None
    config, folder, resume = parse(argv)
    data = config.data
    load_index(data.shards, data.cache_dir, data.cache_gb)  # a missing set is told before ranks meet
    asked = config.runtime
    accelerator, world = runtime.start(config.train.precision, asked.threads, asked.timeout_s, asked.deterministic)
    started = time.time()
    with contextlib.ExitStack() as leaving:
        stop_requests = leaving.enter_context(contextlib.closing(runtime.StopRequests(folder)))  # until the process ends
        leaving.push(runtime.leave)
        watch = leaving.enter_context(Watch(world, config.runtime.timeout_s, runtime.master_address()))

        def decide_decoder() -> RunConfig:
            begins_elsewhere = source is not None and not has_begun(folder)
            settled = branch.run_of(source) if begins_elsewhere else folder
            return choose_decoder(config, settled, world.device, config.data.threads or world.num_cores)

        config = ranks.on_main(world, decide_decoder)

        def claim_folder() -> list[str]:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                leaving.enter_context(contextlib.closing(runtime.RunLock(folder)))
                said = branch.open_branch(config, folder, source, resume, world)
                open_run_folder(config, folder, resume or source is not None)
                return said
            except OSError as error:
                raise UserError(f"{folder}: cannot write the run folder: {error.strerror}.") from None

        complaints = ranks.on_main(world, claim_folder)
        has_just_begun = bool(complaints)  # --from, which says where
        ranks.on_each_machine(world, wait_until_shown, folder)
        resume = resume or source is not None  # from here on, what began elsewhere goes on
        run = leaving.enter_context(contextlib.closing(Run(config, folder, accelerator, world, stop_requests)))
        state = run.new_state()
        if run.missing_weights and not resume:
            raise run.missing_weights
        watch.read_step = lambda: state.step
        if resume:
            complaints += run.resume(state)
            complaints += [] if has_just_begun else [run.place(state)]
        goes_on = resume and (folder / "metrics.jsonl").exists()
        run.tracker = open_tracker(folder, config, world.is_main, run.num_steps, state.step if goes_on else None)
        leaving.push(lambda kind, error, trace: run.tracker.finish(kind is None))
        is_leaving = threading.Event()
        leaving.callback(is_leaving.set)
        watch.is_busy = lambda: is_leaving.is_set() or run.checkpoints.is_writing()
        complaints += split_warnings(config, run.index) + config_warnings(config, world.world_size, run.network)
        complaints += [] if run.checkpoints.chosen else [*run.remarks, *pretrained_remarks(config, run.index)]
        if runtime.is_slow(config.train.precision, world.device):
            complaints.append("train.precision is bf16, which this CPU has no instructions for: fp32 is far faster here.")
        for line in (run.summary(), *complaints):
            run.tracker.message(line)
        if world.is_main:
            origin = branch.origin(folder)
            replace_json(folder / "environment.json", runtime.environment(world) | ({"branched_from": origin} if origin else {}))

        try:
            train(run, state)
            is_done = run.is_over(state) and finish(run, state)
        except torch.OutOfMemoryError as error:
            raise run.lacks_memory(error) from error
        if is_done:
            steps = f"{state.step:,} {'step' if state.step == 1 else 'steps'}"
            start = "this start" if goes_on else "the start"
            run.tracker.message(f"{folder}: done after {steps}, {time.time() - started:,.0f} s since {start}, set-up included")
        has_halted = state.step >= run.halt_step and not run.is_evaluation_due(state)
        if not is_done:
            reason = run.stop_requests.reason or "another rank was asked"
            reason = f"train.max_steps {config.train.max_steps}" if has_halted else reason
            run.tracker.message(f"{folder}: stopped at step {state.step:,} ({reason}); go on with --resume")
        return 0 if is_done or has_halted else runtime.EXIT_STOPPED


if __name__ == "__main__":
    from dist_train.cli import run_command

    sys.exit(run_command(run_training, sys.argv[1:]))
