"""What a run is made of: its settings, shards, network, ranks and folder."""

import dataclasses
import math
from pathlib import Path

import torch

from dist_train import messages, plan, ranks, runtime, sizes
from dist_train.augment import Augment
from dist_train.bad_samples import BadSamples, record
from dist_train.cache import DecodedCache
from dist_train.checkpoint import Checkpoints
from dist_train.config import RunConfig
from dist_train.errors import UserError
from dist_train.evaluate import Evaluation, evaluate, standardised
from dist_train.folds import statistics_of, view_of
from dist_train.gpu_decode import GpuDecoder
from dist_train.guard import Guard
from dist_train.initial_network import initial_network
from dist_train.layers import use_sync_batchnorm
from dist_train.loss import class_weights
from dist_train.metrics import flops_per_sample, peak_flops
from dist_train.mixing import mix
from dist_train.models import head_name
from dist_train.optim import Plateau, WeightAverage, build_optimizer
from dist_train.parallel import parallelize
from dist_train.pretrained import put_weights
from dist_train.progressive import Progressive
from dist_train.run_folder import data_facts, refuse_other_shards
from dist_train.state import State, plain
from dist_train.step_parts import StepParts


class Run:
    """One training run's fixed surroundings: settings, data, network, ranks, folder.

    stop_requests: None where nobody asks for a stop.
    """

    def __init__(
        self, config: RunConfig, folder: Path, accelerator, world: runtime.World,
        stop_requests: runtime.StopRequests | None = None,
    ):  # fmt: skip
        self.config, self.folder, self.accelerator, self.world = config, folder, accelerator, world
        index = view_of(config)
        sizes.check_sizes(config, index, world)
        mean, std = ranks.on_main(world, statistics_of, index, config)
        self.index = dataclasses.replace(index, mean=mean, std=std)
        num_samples = self.index.split(config.data.train_split).num_samples
        self.steps_per_epoch = num_samples / config.data.global_batch_size
        self.num_steps = sizes.whole_steps(config.train.epochs, num_samples, config.data.global_batch_size)
        self.freeze_steps = sizes.whole_steps(config.optim.freeze_epochs, num_samples, config.data.global_batch_size)
        self.halt_step = config.train.max_steps or math.inf
        self.checkpoints = Checkpoints(folder, config.train.keep_checkpoints)
        self.tracker = self._peak_flops = None

        self.input_size = sizes.input_size(config, self.index)
        self.remarks = []  # what is to be said of the weights of model.pretrained
        is_begun = ranks.on_main(world, (folder / "checkpoints").is_dir)  # other machines may not see a new one yet
        network, self.missing_weights = initial_network(config, self.index, is_begun, self.remarks.append)
        how = config.data.interpolation
        self.progressive = Progressive(config.augment, self.input_size, self.num_steps, how) if self.input_size else None
        # size of what enters -> operations of a sample in training, of the whole network, before it is spread over the ranks
        self.sample_flops = (
            self.progressive.flops(network) if self.progressive else
            {None: flops_per_sample(network, (len(self.index.features),), training=True)}
        )  # fmt: skip
        self.num_parameters = sum(p.numel() for p in network.parameters())
        if config.train.sync_batchnorm and world.world_size > 1:
            use_sync_batchnorm(network)
        if config.train.channels_last:
            network = network.to(memory_format=torch.channels_last)
        self.network = network.to(world.device)
        self.head = head_name(self.network, self.index.num_classes)
        self.parallel = parallelize(self.network, config, accelerator, world)
        self.model = self.parallel.model
        optimizer = self.parallel.optimizer(build_optimizer(self.network, config.optim, self.head, config.train.precision))
        # the loader and the schedule stay with us: Accelerate would read on rank zero for all, and step once per rank
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.parts = self.new_parts(config.train.profile_steps)
        self.guard = Guard(world.device, world.world_size)
        self.augment = self._new_augment()
        self.augmented = torch.compile(self._augmented, dynamic=False) if config.train.compile else self._augmented
        self.micro_batch_size = sizes.micro_batch_size(config, world.world_size)
        counts, power = self.index.split(config.data.train_split).class_counts, config.optim.class_weights
        self.class_weights = class_weights(counts, power, world.device) if power else None
        data = config.data
        if data.verify:
            ranks.on_each_machine(world, self.index.check_tables, {data.train_split, data.val_split, data.test_split})
        self.bad_samples = BadSamples(data.max_bad)
        self.gpu_decoder = GpuDecoder(world.device) if data.decode == "gpu" else None
        self.decoded = DecodedCache(data.cache, data.decoded_gb, data.cache_dir, world.device, data.verify, data.cache_gb)
        self.stop_requests = stop_requests

    def _new_augment(self) -> Augment | None:
        on_device, index, how = sizes.on_device_augment(self.config, self.index), self.index, self.config.data.interpolation
        return None if index.features else Augment(on_device, self.input_size, index.mean, index.std, self.world.device, how)

    def summary(self) -> str:
        """What is trained on what, where, in a line."""
        config, split = self.config, self.index.split(self.config.data.train_split)
        steps = f"{self.num_steps:,} {'step' if self.num_steps == 1 else 'steps'}"
        return (f"{self.folder}: {config.model.name}, {self.num_parameters:,} parameters, on {split.num_samples:,} samples of "
                f"{self.index.num_classes} classes; {steps} of {config.data.global_batch_size}, "
                f"{config.train.precision}; {runtime.where(self.world)}")  # fmt: skip

    def new_parts(self, num_steps: int) -> StepParts:
        """Clocks for a window of steps."""
        watched = list(self.network.parameters()) if self.world.world_size > 1 else ()
        return StepParts(self.world.device, num_steps, parameters=watched)

    def new_state(self) -> State:
        optim = self.config.optim
        average = WeightAverage(self.network, optim.ema_decay) if optim.ema_decay else None
        plateau = Plateau(optim.plateau_patience, optim.step_factor)
        judged = 0 if self.num_steps else -1  # train.epochs 0: the weights to be evaluated are those of the beginning
        return State(self.network, self.optimizer, average, plateau, torch.zeros((), device=self.world.device), judged_step=judged)

    def stream(self, first_step: int):
        """This rank's batches from first_step to the end of the run."""
        stream = sizes.training_stream(
            self.config, self.index, threads=self.config.data.threads or self.world.num_cores, world=self.world.place,
            start_step=first_step, stop_step=self.num_steps, pin_memory=self.world.device.type == "cuda", cache=self.decoded,
            bad_samples=self.bad_samples, gpu_decoder=self.gpu_decoder,
        )  # fmt: skip
        ranks.meet(self.world)  # one may have had to decode the split to its disk
        return stream

    def prepare(self, images: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor):
        """Stored values -> what enters the network, augmented and normalised; and the targets, soft where mixed."""
        if self.augment is None:
            return standardised(images, self.index), labels
        with torch.no_grad():
            return self.augmented(images, labels, keys)

    def _augmented(self, images: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor):
        pixels, config = self.augment(images, keys), self.config.augment
        is_mixing = config.mixup or config.cutmix
        return mix(pixels, labels, keys, config, self.index.num_classes) if is_mixing else (pixels, labels)

    def agree_to_stop(self, state: State, loss: torch.Tensor) -> bool:
        """Whether any rank was asked to stop, by the step before: looking a step late, the host never waits for the device.

        Called between backward and update: where the loss of any rank is not finite, this update and all later ones
        leave the weights alone, and the next look raises UserError on every rank.
        """
        wish = bool(self.stop_requests)
        self.guard.note(state.step, loss, wish)
        skips = can_skip_updates(self.optimizer)
        if skips and getattr(self.optimizer, "scaler", None) is not None:  # which sets found_inf itself, by the gradients
            self.guard.spoil(min((p.grad for p in self.network.parameters() if p.grad is not None), key=torch.Tensor.numel))
        elif skips:
            plain(self.optimizer).found_inf = self.guard.not_finite
        asked = self.check_loss(state.step - 1 if skips else state.step)
        return asked if self.world.world_size > 1 else wish

    def check_loss(self, newest_step: float = math.inf) -> bool:
        """Raise UserError, on every rank, if the loss of a step up to this one was not finite; waits for the device.

        Done before figures are logged and weights judged or saved. Returns whether any rank was asked to stop.
        """
        asked, bad = self.guard.read(newest_step)
        if bad is None:
            return asked
        step, loss = bad
        raise UserError(
            f"step {step}: the loss is not finite ({float(loss)} on rank {self.world.rank}); "
            f"the weights were not changed.\n  {self._calmer()} The step's samples: {plan.command(self.config, step)}"
        )

    def _calmer(self) -> str:
        """What to do about a run that diverges; --resume would take the same steps again."""
        if not (self.checkpoints.finished() or self.checkpoints.is_writing()):
            return "Begin another run (--run) with a lower optim.lr, or with optim.clip_norm."
        return (f"Begin another run from a checkpoint before it, with a lower optim.lr or with optim.clip_norm: "
                f"--run runs/NEW --from {self.folder}, or one of {self.folder}/checkpoints.")  # fmt: skip

    def lacks_memory(self, error: torch.OutOfMemoryError) -> UserError:
        """What to say where this rank's device has no room for what goes through the network at once."""
        config, at_once = self.config, self.micro_batch_size
        halved = dataclasses.replace(config.train, micro_batch_size=max(1, at_once // 2))
        smaller = sizes.micro_batch_size(dataclasses.replace(config, train=halved), self.world.world_size)
        is_mixing = config.augment.mixup or config.augment.cutmix
        is_left = smaller < at_once and not (is_mixing and smaller % 2) and not self.parallel.replays_graphs
        is_refused = sizes.adds_in_bf16(config, self.world.world_size)
        how = f"--from {self.folder} --run runs/NEW --train.reduce_precision fp32" if is_refused else "--resume"
        advice = f"Go on with {how} --train.micro_batch_size {smaller}" if is_left else (
            "Fewer do not go through: take a device with more memory, more ranks with train.parallel: fsdp, or a smaller network"
        )  # fmt: skip
        what = ". ".join(str(error).split(". ")[:2]).rstrip(".")
        return UserError(f"the device of rank {self.world.rank} ({self.world.device}) has no room for {at_once} samples at once: "
                         f"{what}.\n  {advice}.")  # fmt: skip

    def mean_over_ranks(self, value: torch.Tensor) -> float:
        value = value.clone()
        if self.world.world_size > 1:
            with messages.clock.waiting():
                torch.distributed.all_reduce(value)
        return float(value) / self.world.world_size

    def work_figures(self, images_per_s: float, step: int) -> dict[str, float]:
        """{"tflops": reached by all ranks together, "mfu": their share of what they could}; {} before the profiled window's end.

        step: the last one, whose size of pictures counts. A frozen network does less than is counted here. mfu is a share of the
        measured rate of a matrix product; Chowdhery et al. 2022 divide by the data sheet's. It is 1 where a network is faster than
        that product was, as on a CPU that something else kept busy meanwhile.
        """
        if not self.parts.is_complete:
            return {}
        if self._peak_flops is None:
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.train.precision]
            self._peak_flops = peak_flops(self.world.device, dtype) * self.world.world_size
        size = self.progressive.size_at(step) if self.progressive else None
        flops = images_per_s * self.sample_flops[size]
        return {"tflops": round(flops / 1e12, 4), "mfu": min(1.0, round(flops / self._peak_flops, 4))}

    def name_bad_samples(self) -> None:
        """Name the pictures that any rank could not decode. Raises UserError, on every rank, where they are too many."""
        news = self.bad_samples.news(ranks.from_every_rank(self.world, self.bad_samples.noted()))
        if news and self.world.is_main:
            record(self.folder / "bad-samples.txt", news)
        for line in news:
            self.tracker.message(f"{line}; the next good sample takes its place")

    def epoch_of(self, step: int) -> float:
        return round(step / self.steps_per_epoch, 4)

    def is_evaluation_step(self, step: int) -> bool:
        """True at the first step at or past every multiple of train.eval_every_epochs."""
        period = self.config.train.eval_every_epochs * self.steps_per_epoch
        return period > 0 and int(step / period) != int((step - 1) / period)

    def check_weights(self, state: State) -> None:
        """Raise UserError, on every rank, if a weight is not finite: from a finite loss a gradient may still overflow."""
        here = [getattr(p, "to_local", lambda p=p: p)() for p in self.network.parameters()]
        norm = torch.nn.utils.get_total_norm([p.detach() for p in here if p.numel()], float("inf"))
        norm = norm.to(self.world.device)  # a rank that holds no row of any weight gets its 0 on the CPU
        bad = (~torch.isfinite(norm)).float()
        if self.world.world_size > 1:
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        if bad:
            raise UserError(f"step {state.step}: the weights are no longer finite, so they were not saved.\n"
                            f"  {self._calmer()}")  # fmt: skip

    def is_evaluation_due(self, state: State) -> bool:
        """Whether these weights are to be judged and have not been: after the last step in any case."""
        is_time = self.is_evaluation_step(state.step) or state.step >= self.num_steps
        return is_time and state.judged_step < state.step

    def is_over(self, state: State) -> bool:
        """Whether nothing is left to train or to judge."""
        if self.is_evaluation_due(state):
            return False
        return state.step >= self.num_steps or state.has_lost_patience(self.config.train.patience)

    def evaluate(self, split: str, confusion: bool = True) -> Evaluation:
        """Evaluate the network as it is on a split. Raises Interrupted, on every rank, if the run is asked to stop."""
        self.check_loss()
        crop, asked = sizes.eval_crop(self.config, self.index), lambda: bool(self.stop_requests)
        with self.parallel.whole() as network:
            more = crop, asked, self.decoded, confusion
            return evaluate(self.config, self.index, split, network, self.accelerator, self.world, *more)

    def save(self, state: State, is_best: bool) -> None:
        """Write a checkpoint in the background.

        Raises UserError, on every rank, where the weights are not to be kept and where the checkpoint before could not be written.
        """
        self.checkpoints.wait_together(self.world)  # rank zero alone would let the others wait in their next message
        self.check_loss()
        self.check_weights(state)
        if self.world.world_size > 1:  # whoever resumes, in whatever number, adds to the mean over the ranks
            messages.average_over_ranks([state.loss_sum])
        saved = state.to_saved(self.accelerator.scaler)
        tensors = self.parallel.gathered(saved.tensors)
        if self.world.is_main:
            saved.state.update(data=data_facts(self.index, self.config.data), statistics=[self.index.mean, self.index.std])
            self.tracker.sync()
            self.checkpoints.save(dataclasses.replace(saved, tensors=tensors), is_best)
        if self.config.data.max_bad:
            self.name_bad_samples()  # afterwards: that they are too many loses no step

    def close(self) -> None:
        """Let no checkpoint be half written when the process ends."""
        try:
            self.checkpoints.wait()
        finally:
            self.decoded.close()

    def resume(self, state: State) -> list[str]:
        """Bring state to the newest whole checkpoint, if there is one; return what is to be said of damaged ones."""
        saved, complaints = self.checkpoints.agree_on_newest(self.world)
        if saved is None and self.missing_weights:
            raise self.missing_weights
        if saved is not None:
            refuse_other_shards(saved, self.index, self.config.data, self.folder)
            now = self.index.mean, self.index.std
            mean, std = now if self.config.data.mean else saved.state.get("statistics", now)  # whatever brought them
            self.index = dataclasses.replace(self.index, mean=mean, std=std)
            self.augment = self._new_augment()
            has_best = ranks.on_main(self.world, self.checkpoints.has_best, saved)
            tensors = self.parallel.scattered(saved.tensors)
            state.restore(dataclasses.replace(saved, tensors=tensors), self.accelerator.scaler)
            if not has_best:
                state.best_value = None  # the next that is judged is the best
        return complaints

    def place(self, state: State) -> str:
        """Where a run that was resumed goes on, in a line."""
        if (chosen := self.checkpoints.chosen) is None:
            return f"{self.folder}: no checkpoint to go on from: begins at step 0"
        return f"{self.folder}: goes on from step {state.step:,} of {self.num_steps:,} ({chosen.parent.name}/{chosen.name})"

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Give the network these weights; whole tensors by name."""
        put_weights(self.network, self.parallel.scattered({"model": weights})["model"])


def can_skip_updates(optimizer) -> bool:
    """Whether the optimizer itself leaves the weights alone where a flag on the device says so (found_inf), as torch's fused do."""
    return getattr(plain(optimizer), "_step_supports_amp_scaling", False)
