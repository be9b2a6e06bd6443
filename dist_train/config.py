"""Every knob, with its meaning and unit. `settings.read_config` reads them from YAML files and the command line."""

from dataclasses import dataclass, field
from typing import Literal

from dist_train.settings import flatten


@dataclass(frozen=True)
class DataConfig:
    """Which samples are read, in which order, and how they become pixels."""

    shards: str = ""
    """folder with an index.json, as written by `dist-train shard` or `dist-train index`; or its URL: https://, s3://, gs://,
    az://, or file:///FOLDER, which brings shards from a slow disk into data.cache_dir before their use"""
    train_split: str = "train"
    """split that is trained on; several as one by +: train+val, once settings are chosen (data.val_split none)"""
    val_split: str = "val"
    """split that is evaluated while training, picks the best checkpoint and stops early; empty or none for none"""
    test_split: str = "test"
    """split that is evaluated once, at the end; empty or none for none"""
    folds: int = 0
    """k-fold cross-validation: parts that the training split is dealt into, by class; 0 is none"""
    fold: int = 0
    """the part, from 0, that takes the place of val_split; the others are trained on"""
    global_batch_size: int = 128
    """samples per step over all ranks together; the same on any number of ranks"""
    image_size: int = 0
    """height and width that enter the network, pixels; 0 keeps the stored size"""
    eval_size: int = 0
    """the same in evaluation, predict and exported files, for networks that take any size: 224 after a training at 176 is usual
    (FixRes); 0 is image_size"""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """how pictures are resized, antialiased, in training, evaluation, predict and exported files; many weights for model.pretrained
    are from bicubic. Rotation, the moves of augment.trivial and augment.rand_ops, and the random box that the device cuts out of
    pictures of one size are sampled bilinearly all the same"""
    crop: Literal["auto", "random_resized", "resize"] = "auto"
    """what the decoder cuts out for training: a random box (keyed by the sample) or the whole picture; auto takes the
    random box where augment.crop asks for one and pictures differ in size, and leaves one-size sets to the device"""
    eval_crop: float = 0.875
    """share of the shorter side kept by the central crop in evaluation, where training crops at random (random_resized), and
    pictures differ in size or are stored larger than they enter; elsewhere, and with 0, the whole picture is taken, whatever its
    shape"""
    mean: tuple[float, ...] = ()
    """mean by which pixels / 255 are normalised, a number for each of the three channels (of a table, for each column); empty takes
    that of model.pretrained, where it brings one, else that of the training split"""
    std: tuple[float, ...] = ()
    """standard deviation, with mean"""
    window_shards: int = 16
    """samples are shuffled inside windows of this many shards; at least the number of shards is a full shuffle"""
    lanes: int = 0
    """parts of an epoch read side by side, dealt over the ranks; 0 derives it from the shards and the batch size"""
    decode: Literal["auto", "cpu", "gpu"] = "auto"
    """who decodes pictures that are cut anew in every epoch: auto measures both at the start of a run where there is a GPU, and
    is cpu elsewhere. Pixels differ a little, so a run keeps what it began with; evaluation is decoded by the CPU"""
    threads: int = 0
    """decoding threads per process; 0 is this rank's share of the cores: those it may run on, divided among the ranks that may"""
    prefetch_mb: int = 256
    """decoded batches kept ahead of the step, MB per process"""
    verify: bool = True
    """compare every sample's checksum as it is read"""
    max_bad: int = 0
    """pictures of the training split that cannot be decoded before the run stops; each is named, in bad-samples.txt as well, and
    the next good one of the split takes its place"""
    cache: Literal["auto", "none", "memory", "disk", "device"] = "auto"
    """where decoded pictures are kept from epoch to epoch, unless a random crop is cut while decoding: memory (the ranks of a
    node share one copy), disk (a file in cache_dir, used by later runs as well) or device (each GPU holds all of them); auto
    is memory for small sets"""
    decoded_gb: float = 4.0
    """cache auto: most that decoded splits take in memory together, GB; and never more than half of what is free"""
    cache_dir: str = ""
    """where shards behind a URL and decoded pictures are kept; default dist_train in the user's cache folder, which a quota may
    keep small. The ranks of a node share it"""
    cache_gb: float = 100.0
    """most that fetched shards take there, GB, and as much again for decoded pictures; the least recently used go first. Where the
    disk or a quota leaves less, shards take less: nine tenths of the disk's room, and more only if those in use need it"""

    @property
    def side_evaluated(self) -> int:
        """Height and width that enter the network in evaluation, pixels; 0 keeps the stored size."""
        return self.eval_size or self.image_size


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to training pictures on the device; every draw is keyed by (seed, epoch, sample)."""

    crop: Literal["none", "random_resized", "padded"] = "none"
    """random resized crop (Inception style), or a random crop after padding"""
    scale: tuple[float, float] = (0.35, 1.0)
    """area of the random resized crop as a share of the picture, least and most. 0.35 keeps most of the picture in view; 0.08 is
    usual for ImageNet, and what data.open_stream takes where it is called without a scale"""
    ratio: tuple[float, float] = (0.75, 1.3333333)
    """aspect ratio, width / height, of the random resized crop"""
    padding: int = 4
    """pixels of padding for crop: padded; of what enters the network, whatever size pictures are stored in"""
    flip: float = 0.0
    """probability of a left-right flip"""
    flip_alternates: bool = False
    """flip one half of the pictures in one epoch, the other half in the next, instead of by chance; flip must be 0.5"""
    flip_vertical: float = 0.0
    """probability of a top-bottom flip, for pictures taken from the air or through a microscope"""
    rotate_degrees: float = 0.0
    """rotation drawn evenly from plus or minus this angle"""
    trivial: bool = False
    """one operation a picture, drawn with its strength (TrivialAugment, wide ranges): shear, shift (up to 32 pixels), rotation,
    brightness, colour, contrast, sharpness, posterize, solarize, autocontrast, equalize or none. It comes after crop, flips and
    rotate_degrees and before brightness to erase, which are done besides it where they are set"""
    rand_ops: int = 0
    """operations a picture, one after the other, each drawn anew (RandAugment): those of augment.trivial and in its place, all of
    one strength, in torchvision's ranges for it; 2 is usual, 0 is off. AutoAugment's own policies are not here"""
    rand_magnitude: int = 9
    """strength of RandAugment's operations, 0 to 30; signed ones get their sign by chance"""
    brightness: float = 0.0
    """factor drawn from 1 plus or minus this"""
    contrast: float = 0.0
    """factor drawn from 1 plus or minus this"""
    saturation: float = 0.0
    """factor drawn from 1 plus or minus this"""
    hue: float = 0.0
    """shift drawn from plus or minus this, in turns; at most 0.5"""
    grayscale: float = 0.0
    """probability of dropping the colour"""
    erase: float = 0.0
    """probability of erasing a random box (random erasing)"""
    mixup: float = 0.0
    """alpha of mixup's Beta distribution; 0 is off, 0.2 is usual"""
    cutmix: float = 0.0
    """alpha of cutmix's Beta distribution; 0 is off, 1.0 is usual; with mixup on, each pair does one of them"""
    start_size: int = 0
    """pixels of the shorter side that enter the network at first, rounded up to an eighth of the full size; then they grow by
    eighths (progressive resizing), and the first steps cost less; with train.compile each size is compiled; 0 is full size
    throughout"""
    full_size_from: float = 0.7
    """share of the run after which pictures are at full size, where start_size is set"""


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: str = "alexnet"
    """alexnet (2014, torchvision's), alexnet_bn (the wider one of 2012, with BatchNorm), vgg11 to vgg19 (and _bn), mlp, any
    torchvision classifier, or timm/NAME, any of timm's that has one last layer (pip install 'dist_train[timm]')"""
    pretrained: str = ""
    """torchvision's or timm's weights by name ("DEFAULT", "IMAGENET1K_V1", timm's "a1_in1k"), with the mean and deviation of
    pixels they were trained with, or a .pth, .pth.tar or .safetensors file (torchvision's own files, timm's beside their
    config.json and a run's weights.safetensors bring theirs, too); a checkpoint of torchvision's or timm's references gives the
    average of its weights, where it has one; empty starts fresh"""
    dropout: float = 0.5
    """dropout in the classifier of alexnet and vgg, after each hidden layer of the mlp; elsewhere 0.5 leaves the network's own, and
    any other is taken by what has dropout as a layer: torchvision's efficientnet, googlenet, inception, mnasnet, mobilenet and
    squeezenet (before the last layer) and vit (in every block), timm's as drop_rate"""
    drop_path: float = -1.0
    """stochastic depth: share of the samples that pass the last block by; from the first block it rises to it evenly; -1 leaves the
    network's own. torchvision's convnext, efficientnet, maxvit and swin have it, timm's as drop_path_rate"""
    stem: Literal["auto", "imagenet", "small"] = "auto"
    """small keeps resolution: 3x3 kernels, stride 1, a head sized to what is left; auto takes it under 64 px (alexnet_bn:
    128 px, where 5x5 kernels with stride 2 serve from 64 px on)"""
    width: float = 1.0
    """channels and hidden units of alexnet and vgg, times this"""
    init: Literal["he", "dirac"] = "he"
    """how alexnet and vgg begin: he draws every filter; dirac lets each convolution but the first pass its inputs on in as many
    of its filters, which learns faster from scratch, with BatchNorm most of all"""
    hidden: tuple[int, ...] = (128, 128, 128)
    """hidden layers of the mlp"""
    activation: Literal["relu", "leaky_relu", "elu", "selu", "gelu", "silu", "tanh"] = "relu"
    """activation of the mlp"""
    batchnorm: bool = False
    """BatchNorm after each hidden layer of the mlp"""


@dataclass(frozen=True)
class OptimConfig:
    """How the weights are changed."""

    name: Literal["sgd", "adam", "adamw", "adamax", "rmsprop", "muon"] = "sgd"
    """optimizer; rmsprop has alpha 0.9 and eps 0.0316, torchvision's for MobileNetV3 and EfficientNet; muon moves hidden matrices
    and kernels along orthogonal directions, all else as sgd does"""
    lr: float = 0.01
    """peak learning rate; plain AlexNet and VGG without BatchNorm learn near 0.01, not at ResNet's 0.1"""
    muon_moves: Literal["matrices", "kernels"] = "matrices"
    """muon: hidden layers that it moves; kernels leaves linear ones to sgd: orthogonalizing AlexNet's of full width
    takes longer than its step"""
    rest_lr: float = 0.1
    """muon: peak learning rate of what it does not move: the last layer, biases, norms"""
    rest_weight_decay: float = 5e-4
    """muon: decay of the matrices that it does not move"""
    momentum: float = 0.9
    """momentum of sgd, rmsprop and muon, first beta of the Adam family"""
    beta2: float = 0.999
    """second beta of the Adam family"""
    nesterov: bool = True
    """Nesterov momentum, sgd only"""
    weight_decay: float = 5e-4
    """decay of weight matrices and kernels; biases and norms are not decayed"""
    schedule: Literal["constant", "cosine", "one_cycle", "step", "plateau"] = "cosine"
    """learning rate over the run"""
    layer_decay: float = 1.0
    """fine-tuning: the last layer learns at lr, each layer below at the rate of the one above times this; 0.7 is usual"""
    freeze_epochs: float = 0.0
    """fine-tuning: epochs at the start in which only the last layer is trained; train.epochs or more is the whole run"""
    warmup_epochs: float = 0.0
    """linear warm-up, epochs; for one_cycle the length of the rise, where 0 is 30% of the run"""
    final_lr: float = 0.0
    """learning rate at the end of cosine and one_cycle, as a share of the peak"""
    step_epochs: float = 30.0
    """step: epochs between drops"""
    step_factor: float = 0.1
    """step and plateau: the rate is multiplied by this"""
    plateau_patience: int = 2
    """plateau: evaluations in a row without improvement that are let pass; the next one drops the rate, so it takes one more
    than train.patience of the same number"""
    label_smoothing: float = 0.0
    """share of the label's weight that is spread evenly over all classes"""
    class_weights: float = 0.0
    """unbalanced classes: a sample's loss is weighted by the inverse frequency of its class in the training split to this power,
    with mean 1: 1 balances the classes, 0.5 goes half way, 0 is off"""
    clip_norm: float = 0.0
    """gradients are scaled down to this global norm; 0 is off"""
    ema_decay: float = 0.0
    """exponential moving average of the weights, which is then what is evaluated and kept; 0 is off, 0.999 is usual"""


@dataclass(frozen=True)
class TrainConfig:
    """How long, how precisely, and what is kept."""

    epochs: float = 10.0
    """length of the run, passes over the training split; 0 trains nothing and evaluates the weights of model.pretrained"""
    max_steps: int = 0
    """stop after this many steps whatever the epochs say; 0 is no limit. The schedule is that of the whole run"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """arithmetic of the forward and backward pass; weights stay fp32. fp16 needs a GPU; fp32 is TF32 in products and convolutions
    where the GPU has it"""
    parallel: Literal["ddp", "hybrid", "fsdp"] = "ddp"
    """how several ranks share the network: ddp, whole on each; hybrid, the fully connected layers of alexnet and vgg split over
    the ranks, so that activations travel and not their gradients; fsdp, every weight split, its gradient and the optimizer's state
    too. The whole network must fit on one device: each begins and evaluates with all of it. hybrid and fsdp take neither fp16,
    optim.freeze_epochs nor muon"""
    split_ranks: int = 0
    """hybrid: ranks that share one copy of the fully connected layers, a node's, say; 0 is all of them"""
    reduce_precision: Literal["fp32", "bf16"] = "fp32"
    """in which gradients travel between ranks and are added up: bf16 halves their bytes, for links slower than the arithmetic, and
    rounds each to 8 bits; weights and the optimizer keep fp32"""
    micro_batch_size: int = 0
    """most samples a rank takes through the network at once; a larger share is accumulated; 0 takes it whole. It may differ on
    --resume; bit for bit holds with the same value alone, and BatchNorm's batch follows it"""
    eval_every_epochs: float = 1.0
    """epochs between evaluations; 0 evaluates at the end only"""
    monitor: Literal["top1", "balanced", "loss"] = "top1"
    """validation figure that picks the best checkpoint and stops early; balanced is balanced accuracy, the mean over the classes of
    the share that is right of each: a rare class counts as much as a common one"""
    patience: int = 0
    """stop after this many evaluations without improvement; 0 never"""
    flip_test: bool = False
    """evaluate the mean of each picture's and its mirror image's logits"""
    shift_test: int = 0
    """pixels: evaluate the mean of each picture's logits and those of it moved so far both ways along its diagonal; 0 is off"""
    sync_batchnorm: bool = True
    """BatchNorm over what all ranks take through at once, so that the figures do not depend on the number of ranks: the global
    batch, unless micro_batch_size cuts it"""
    channels_last: bool = True
    """memory format of kernels; pictures lie channels-last in any case"""
    compile: bool = False
    """torch.compile the network and the augmentation; pays on GPUs"""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """with compile: reduce-overhead replays a step's kernels as CUDA graphs, for networks of many small ones; max-autotune also
    times several kernels for each product, which takes minutes"""
    checkpoint_every_steps: int = 500
    """steps between checkpoints, besides one at every evaluation; 0 is none besides"""
    keep_checkpoints: int = 2
    """newest checkpoints kept; the best one is kept besides"""
    log_every_steps: int = 20
    """steps between log lines"""
    profile_steps: int = 10
    """steps, after ten to warm up, whose parts are timed one by one, for where the time goes; 0 is none"""


@dataclass(frozen=True)
class TrackConfig:
    """Where figures go, besides the console and metrics.jsonl."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """Weights & Biases: auto is online where an API key is present; elsewhere offline: recorded in the run folder. The variable
    WANDB_MODE wins over auto, online and offline; off is off"""
    project: str = "dist_train"
    """Weights & Biases project"""
    entity: str = ""
    """Weights & Biases team or user; empty is the default one"""


@dataclass(frozen=True)
class RuntimeConfig:
    """The process: nothing here changes a result, but for the last bits, by the number of threads that add."""

    threads: int = 0
    """CPU threads of the arithmetic per process; 0 is this rank's share of the cores, as for data.threads"""
    deterministic: bool = False
    """on GPUs: no kernels that add in an order of chance, where torch knows others, and none chosen by their speed on the day;
    slower. What has no other kernel is named once. A CPU needs none of it"""
    timeout_s: int = 300
    """a rank that does not answer for this long ends the job"""


@dataclass(frozen=True)
class RunConfig:
    """One training run. What a recipe sets."""

    seed: int = 0
    """order, augmentation, initial weights and dropout all follow from it"""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True)
class StudyConfig:
    """One study: many trainings of one recipe, to find better settings. The `study:` part of a study's YAML file."""

    recipe: str = ""
    """recipe that is varied"""
    name: str = ""
    """results go to runs/NAME; default is the name of the study's file"""
    sampler: Literal["grid", "random", "tpe"] = "tpe"
    """every combination, independent draws, or draws that learn from the trials before (tree-structured Parzen estimator)"""
    trials: int = 0
    """trials over all processes; 0 is every combination of a grid, 30 draws otherwise"""
    folds: int = 0
    """trainings per trial, one for each fold of the training split; 0 is one training against the validation split"""
    metric: Literal["top1", "balanced", "loss"] = "top1"
    """validation figure that is optimised: the highest top1 or balanced accuracy or the lowest loss; each training's best
    evaluation counts. It takes the place of train.monitor"""
    prune: bool = True
    """end trials that fall behind the median of those before"""
    prune_from: float = 0.3
    """no trial is ended before this share of its first training, 0 to 1: until then figures tell of the warm-up"""
    seed: int = 0
    """draws the settings; trainings follow from the recipe's seed"""
    storage: str = ""
    """Optuna's journal, a file on a disk that all processes share; default runs/NAME/journal.log"""


# Settings that no result depends on.
_WITHOUT_RESULTS = ("runtime.", "track.", "data.threads", "data.prefetch_mb", "data.verify", "data.max_bad", "data.cache",
                    "data.decoded_gb", "train.parallel", "train.split_ranks", "train.log_every_steps", "train.profile_steps",
                    "train.checkpoint_every_steps", "train.keep_checkpoints")  # fmt: skip

# Settings that may differ between a run and its continuation: wherever the shards lie, they are proven to be the same, and
# fewer ranks may have no room for as many samples at once.
FREE_SETTINGS = (*_WITHOUT_RESULTS, "data.shards", "train.max_steps", "train.micro_batch_size")


def changes_results(name: str) -> bool:
    """Whether a run's figures can depend on a setting, by its dotted name."""
    return not name.startswith(_WITHOUT_RESULTS)


def conflicts(old: dict, new: dict) -> list[str]:
    """Lines naming the settings that differ between two `to_dict` trees and change a result."""
    old, new = flatten(old), flatten(new)
    return [
        f"{key}: {old.get(key)!r} in the run, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(FREE_SETTINGS)
    ]
