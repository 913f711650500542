"""The sections of a config: their settings, defaults and what each is for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
SetName = Annotated[str, Field(pattern=r"^[\w-]*$")]


class Section(BaseModel):
    """A group of settings: unknown names are errors, defaults are documented in place."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_default=True, ser_json_inf_nan="constants"
    )


class SourceConfig(Section):
    """One of several sources of training data."""

    train: list[str]
    """Tar shards, as in `data.train`."""
    weight: float | None = Field(default=None, gt=0.0)
    """Share of every batch, relative to the other sources' (all of them have a weight, or none)."""
    epochs: float = Field(default=1.0, gt=0.0)
    """Without weights: how often this source is read while one with 1 is read once."""


class DataConfig(Section):
    """Which shards are read, and how a sample becomes a row of the batch."""

    train: list[str] = []
    """Tar shards: paths, globs, braces (`x-{000..009}.tar`), URLs (http, s3, ...), `pipe:COMMAND`s (docs/remote.md)."""
    sources: dict[str, SourceConfig] = {}
    """Several sources instead of `train`, by name; every batch holds the same number of pairs of each."""
    negatives: Count = 0
    """Hard-negative captions a pair (K); sampled from the shard's `negatives`, uniformly over kinds."""
    negative_kinds: list[str] = []
    """Kinds of negatives to draw from; empty: all that the shards hold."""
    negative_policy: Literal["uniform", "hardest", "curriculum"] = "uniform"
    """Which K: kinds in turn; those of the highest `score` (`clipkit negatives score`); or kinds in turn among an easy
    share that grows from half of a caption's negatives to all of them, the highest score last."""
    negative_weights: bool = False
    """Read each negative's `weight` (`negatives audit --balance AUC --by weight`), for `infonce`, `igc` and `tgc`."""
    online_negatives: list[str] = []
    """Kinds of rules (`negatives make`) whose negatives are made while reading, anew each epoch, beside the shard's."""
    negative_images: Count = 0
    """Pictures of negatives a pair (J), of the first J negatives; those with a picture come first."""
    caption: Literal["sample", "first", "all"] = "sample"
    """Which of a picture's C captions is used: one at random (seeded), always the first, or all in turn, each once in C
    epochs."""
    caption_kinds: dict[str, Weight] = {}
    """Kinds of captions to choose from, with their relative chance (`{short: 3, long: 1}`); empty: all, alike."""
    positives: Count = 0
    """Further captions of the same picture a pair (P), as positives; sampled uniformly over kinds."""
    positive_kinds: list[str] = []
    """Kinds of captions that may be positives; empty: all."""
    alternates: bool = False
    """Each pair brings one of its `alternates` in the shard: batches hold twice `batch_size` pairs (NegCLIP)."""
    tags: str = ""
    """Vocabulary of tags, a file with one word a line (`clipkit shards tags`): which of them each picture has."""
    labels: bool = False
    """Read each pair's `label`, its class."""
    augment: Literal["none", "crop"] = "crop"
    """`crop`: random resized crop; `none`: the evaluation transform."""
    crop_scale: Share = 0.9
    """Smallest share of the area a random crop keeps."""
    views: Count = 0
    """Further views of the picture a pair (V): random crops of their own, whatever `augment` says."""
    view_scale: Share = 0.4
    """Smallest share of the area a view keeps."""
    decode: Literal["exact", "scaled"] = "exact"
    """`scaled`: large JPEGs are decoded at 1/2, 1/4 or 1/8: faster, not quite the same pixels; never in evaluation."""
    workers: Count = 2
    """Loader processes a rank; 0 reads in the training process."""
    lanes: Positive = 64
    """Sequential read streams of the plan; part of what fixes the order (docs/design.md)."""
    on_error: Literal["raise", "skip"] = "raise"
    """An unreadable sample ends the run, or is replaced and counted."""
    cache_image_features: bool = False
    """Encode every picture once with the locked image tower and train from the stored features."""
    text_features: SetName = ""
    """Stored features of captions that `model.text.features` reads: the SET of KEY.SET.text.npy (docs/shards.md)."""
    teacher_features: SetName = ""
    """Stored embeddings that `teacher.kind: precomputed` reads: the SET of KEY.SET.text.npy and KEY.SET.image.npy."""


class ImageTower(Section):
    """An image tower of one's own making (ignored when `model.name` is set)."""

    timm: str = ""
    """timm architecture (e.g. mobilenetv2_100); without it or `conv`, `cfg` describes an open_clip vision tower."""
    conv: list[tuple[Positive, Positive]] = []
    """Else a plain convolutional tower: (channels, stride) of each 3×3 layer."""
    weights: str = ""
    """Local safetensors file for the timm tower."""
    cfg: dict[str, Any] = {}
    """Keyword arguments: of `timm.create_model`, or of open_clip's `CLIPVisionCfg`."""
    size: Positive = 224
    """Input pixels a side."""
    resize: Literal["shortest", "squash"] = "shortest"
    """`shortest`: the short side becomes `size`, the centre is kept; `squash`: nothing is cut, proportions change."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    pool: Literal["avg", "attention"] = "avg"
    """How a feature map becomes one vector; attention keeps where things are."""
    head: Literal["linear", "root"] = "linear"
    """From features to the embedding: linear, or root, layer norm and dropout before it, for towers that are locked."""
    dropout: Share = 0.0
    """Dropout in a `root` head while training."""


class TextTower(Section):
    """A text tower of one's own making: open_clip's causal transformer, or an adapter on stored features."""

    width: Positive = 128
    heads: Positive = 4
    layers: Positive = 2
    context_length: Positive = 77
    dropout: Share = 0.0
    """Dropout on the embedded tokens while training."""
    features: Count = 0
    """Width of stored features (`data.text_features`): an adapter of `layers` blocks reads them, also beside a
    `model.name`, in place of its text tower; 0: tokens."""
    embedder: str = ""
    """Model (a reference as of `clipkit eval`) whose embeddings of texts are such features, to evaluate with."""


class TagHead(Section):
    """A linear layer from pictures to one logit for each word of a vocabulary."""

    vocabulary: str = ""
    """The words, one a line: the file of `data.tags`; without it there is no such head."""
    on: Literal["features", "embedding"] = "features"
    """What it reads: what the image tower gives before it is projected, or the embedding."""


class AspectHeads(Section):
    """Several projections of each embedding, and what gives a pair its temperature (AMCL)."""

    count: Count = 0
    width: Positive = 128


class HeadsConfig(Section):
    """Layers on top of the towers; they learn, also where the tower is locked."""

    image: bool = False
    """A linear projection of the image tower's output, which begins as the identity."""
    text: bool = False
    """The same of the text tower's."""
    tags: TagHead = TagHead()
    aspects: AspectHeads = AspectHeads()


class ModelConfig(Section):
    """The dual encoder."""

    name: str = ""
    """open_clip `NAME`, `NAME:PRETRAINED` or `hf-hub:ORG/NAME`; empty: built from `image`, `text`, `embed_dim`."""
    start: str = ""
    """Run folder or checkpoint whose weights training starts from; with `text.features` its image tower, if it reads
    tokens."""
    embed_dim: Positive = 128
    image: ImageTower = ImageTower()
    text: TextTower = TextTower()
    lock_image: bool = False
    """Freeze the image tower, kept in eval mode (LiT); its projection head still learns."""
    lock_text: bool = False
    heads: HeadsConfig = HeadsConfig()
    scale: float | None = Field(default=None, gt=0.0, le=1000.0)
    """Initial multiplicative logit scale (1/temperature); default: as loaded, else 1/0.07."""
    scale_max: float = Field(default=100.0, gt=0.0)
    bias: float | None = None
    """Initial logit bias; a number switches a learned bias on (SigLIP: -10)."""


class TeacherConfig(Section):
    """Where self-distillation looks up to."""

    kind: Literal["none", "frozen", "ema", "precomputed"] = "none"
    """`ema`: moving average of the student; `frozen`: its start, or `start`; `precomputed`: `data.teacher_features`."""
    half_life: float | None = Field(default=None, gt=0.0)
    """EMA half-life as a fraction of the run. Default 0.214: 3.9 % of the start remain, as of DeGLA (0.9996 a step)."""
    half_life_samples: Positive | None = None
    """The half-life in samples instead: the same however long the run is."""
    warmup: Count = 0
    """Samples over which the half-life grows from 0, where the teacher is the student, to its full length."""
    towers: Literal["both", "image", "text"] = "both"
    """Which towers it has. What no term looks at is not encoded either."""
    start: str = ""
    """Model (a reference as of `clipkit eval`) that a `frozen` teacher is, instead of the student's start."""


class OptimConfig(Section):
    """AdamW or Lion with warm-up; weight decay never touches norms, biases, scale or bias."""

    model_config = ConfigDict(allow_inf_nan=False)

    kind: Literal["adamw", "lion"] = "adamw"
    """`lion` (arXiv 2302.06675) keeps one moment, not two; its authors take a third to a tenth of AdamW's `lr` and as
    many times its `weight_decay`."""
    lr: float = Field(default=5e-4, gt=0.0)
    weight_decay: float = Field(default=0.1, ge=0.0)
    betas: tuple[Beta, Beta] | None = None
    """Default: 0.9 and 0.98 of `adamw`, 0.9 and 0.99 of `lion`."""
    eps: float | None = Field(default=None, gt=0.0)
    """Of `adamw`; default: 1e-6."""
    warmup: Count = 0
    """Samples of linear warm-up."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """After the warm-up: `cosine` to zero, `constant`, or `wsd`: constant, then linearly to zero at the end."""
    decay: Share = 0.2
    """Share of the run that `wsd` decays over."""
    grad_clip: float = Field(default=1.0, ge=0.0)
    """Largest global gradient norm; 0 switches clipping off."""
    layer_decay: float = Field(default=1.0, gt=0.0, le=1.0)
    """Learning rate of each layer as a multiple of the next one's; heads and scale learn at the full rate, embeddings
    at the lowest. 1: all alike."""


class EngineConfig(Section):
    """How a step is carried out; the world size comes from the launcher (torchrun)."""

    kind: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """`ddp` also covers a single process; `fsdp` divides weights, gradients and moments among ranks."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What `deepspeed` divides: nothing, moments, gradients as well, weights as well."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What `deepspeed` keeps in the host's memory: moments, fp32 weights and the step (`optimizer`, from stage 1), and
    the divided weights as well (`all`, stage 3). Slower; not on NVMe, where checkpoints could not gather it from."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What towers compute in; weights and moments are fp32. `fp16` scales the loss and may skip the first steps."""
    accumulate: Positive = 1
    """Parts that a rank's share of the batch is encoded in, one after the other: memory of one part, gradient of the
    whole, one more forward (cached accumulation)."""
    checkpoint_activations: bool = False
    """Towers that learn keep only the inputs of their blocks and compute the rest again in the backward pass."""
    compile: bool = False
    """Compile the student's towers (torch.compile), for GPUs: the first steps take minutes."""
    timeout_s: Positive = 1800
    """A collective that waits longer than this ends the job."""
    peak_tflops: float | None = Field(default=None, gt=0.0)
    """What a device can do at most in this precision (H100, bf16: 989); with it the log has `mfu`, the share used."""


class GuardConfig(Section):
    """What a run does about steps that would spoil it, and when it is told to stop."""

    patience: Positive = 3
    """Skipped steps in a row (loss or gradient not finite) after which the run goes back to its newest checkpoint."""
    spike: float = Field(default=10.0, ge=0.0)
    """A loss so many (robust) deviations above the median of the last is written down with its samples; 0: none is."""
    spike_patience: Count = 0
    """Such losses in a row after which the run goes back too; 0: they are only written down."""
    requeue_code: Annotated[int, Field(ge=1, le=255)] = 75
    """Exit status when SIGTERM or SIGUSR1 ended the run early: it has saved, `--resume` goes on (75: EX_TEMPFAIL)."""


class StopConfig(Section):
    """Ending a run when its evaluations (`evaluate_every`) no longer get better; the best weights stay in best/."""

    metric: str = ""
    """A benchmark of `suite` (its headline), BENCHMARK:METRIC, or `pareto`: the means of zero-shot and of compositional
    headlines, where an evaluation is better when no earlier one has as much of both. Empty: no run ends early."""
    patience: Positive = 3
    """Evaluations in a row that are no better after which the run ends. The first is made before the first step."""
    least: Share = 0.0
    """By how much (0.01: one point) an evaluation must be above an earlier one to be better."""
    most_loss: Share = 1.0
    """With `pareto`: zero-shot accuracy that a better one may have lost against the first (0.01: one point)."""


class AdversaryConfig(Section):
    """Training on pictures that are moved against the model in every step (TeCoA); off unless `eps` is above 0."""

    eps: float = Field(default=0.0, ge=0.0, le=255.0)
    """Most that a pixel's value (0 to 255) is moved."""
    steps: Positive = 2
    """Steps of the attack: one more forward and backward pass of the image tower each."""
    step_size: float = Field(default=1.0, gt=0.0)
    """How far a step moves each pixel's value."""
