"""Run configuration: typed, checked on the way in, stored whole in the plan and the manifest.

A configuration comes from code, from a TOML file with one section a part, from flags, or from all of them: flags
override the file. Structs do not validate when built in code; `check` runs the decoder over them, so a bad value is
refused with its path (`Expected int >= 1 - at $.generation.num_beams`), whichever way it came.
"""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, TypeVar

import msgspec

from tracekit.errors import ConfigError
from tracekit.flags import Origins, located, settings_of
from tracekit.sites import DEFAULT_SITES, SITES, resolve_sites
from tracekit.sizes import parse_size

__all__ = [
    "AnswerCaptureConfig",
    "AnswersConfig",
    "CaptureConfig",
    "ClusterConfig",
    "DeviceMap",
    "DrawConfig",
    "FileSource",
    "GenerationConfig",
    "ModelConfig",
    "OutputConfig",
    "Positive",
    "PromptConfig",
    "PromptedConfig",
    "PublishConfig",
    "ReadingConfig",
    "RunConfig",
    "SamplesConfig",
    "ShotsConfig",
    "SiteConfig",
    "SourceConfig",
    "check",
    "check_head_sites",
    "load_toml",
    "memory_limits",
    "read_toml",
    "template_kwargs",
]

Positive = Annotated[int, msgspec.Meta(ge=1)]
NonNegative = Annotated[int, msgspec.Meta(ge=0)]


DeviceMap: TypeAlias = Literal["none", "auto", "balanced", "balanced_low_0", "sequential"]
"""How a model is shared out over devices, in accelerate's names."""


class _Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every part of a configuration."""


class ModelConfig(_Settings, frozen=True, kw_only=True):
    """Which model, and how it is loaded."""

    model: str = "demo"
    """Hub id (`org/name` or `org/name@revision`), local folder, `.gguf` file, or `demo` (SmolLM2-135M-Instruct)."""
    model_path: str | None = None
    """Fine-tuned checkpoint of the model: its weights are used, and its tokenizer where it has one."""
    adapter: str | None = None
    """Adapter of peft (LoRA, DoRA, IA3, ...): local folder or Hub id (`@revision` allowed). Its tokenizer, chat
    template and embedding rows are used where it has them."""
    merge_adapter: bool = False
    """Add the adapter's weights to the model's own instead of running it beside them."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Quantise the weights on loading, with bitsandbytes. A checkpoint that is stored quantised is loaded without."""
    int8_threshold: Annotated[float, msgspec.Meta(ge=0)] = 6.0
    """Outlier threshold of int8. Above 0 rows of a batch influence one another, so capture runs them one by one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype to compute in; `auto` is the checkpoint's own."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, `mps`; `auto` takes an accelerator where there is one."""
    device_map: DeviceMap = "none"
    """Share out a model larger than one device, by accelerate: `auto` and `balanced` evenly over all accelerators,
    `balanced_low_0` with little on the first, `sequential` one full after the other; then host memory, then disk."""
    max_memory: tuple[str, ...] = ()
    """With `device_map`: the most that weights take of each device, `0=20GiB cpu=60GiB`. A device that you do not name
    holds no weights."""
    offload_folder: str | None = None
    """With `device_map`: folder on a fast disk. Weights that fit into no memory are then read anew in every pass."""
    trust_remote_code: bool = False
    """Run Python code from the model repository. Never on unless asked for."""


class SourceConfig(_Settings, frozen=True, kw_only=True):
    """Which examples. A task with a source of its own reads no file."""

    split: str = "validation"
    """Split of the source; for a local file just the name that is written down."""
    limit: Positive | None = None
    """Most examples to use; all by default."""
    offset: NonNegative = 0
    """Rows of the source to skip first."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a row that is malformed, or too long for the model, does: stop the run, or be counted, reported and left
    out."""


class FileSource(SourceConfig, frozen=True, kw_only=True):
    """Which data, and how much of it. Tasks add the columns that they read."""

    source: str = "default"
    """`default` (the task's own dataset on the Hub), another Hub id, a JSONL, Parquet, CSV or TSV file, or `sample`."""


class PromptConfig(_Settings, frozen=True, kw_only=True):
    """How a question becomes a prompt."""

    system: str | None = None
    """System message; for a model without chat template the first line of the prompt. Default: the task's own."""
    chat_template: str | None = None
    """File with a Jinja chat template to use instead of the tokenizer's; `none` for a plain prompt."""
    prompt_form: Literal["auto", "chat", "question", "plain"] = "auto"
    """`chat`: by a chat template; `question`: "Question: ... Answer:"; `plain`: the bare text, for the model to go on
    with, and no system text but a given one; `auto`: `chat` where there is a template, else `question`."""
    template_kwargs: tuple[str, ...] = ()
    """Arguments for the chat template, `name=value` (`enable_thinking=false`)."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Beginning-of-sequence token: `auto` does what tokenizer and template do, never two."""
    template_date: str = "2026-01-01"
    """The date that chat templates see as today, so that the same run gives the same bytes."""


class ShotsConfig(PromptConfig, frozen=True, kw_only=True):
    """How a question becomes a prompt, with solved examples before it."""

    num_shots: NonNegative = 0
    """Solved examples before the question, drawn by seed from those that the task gives."""


class GenerationConfig(_Settings, frozen=True, kw_only=True):
    """How deterministic answers are generated."""

    num_beams: Positive = 5
    """Beams of the deterministic answer; 1 is greedy."""
    max_new_tokens: Positive = 64
    """Longest answer, in tokens."""


class DrawConfig(GenerationConfig, frozen=True, kw_only=True):
    """How answers are generated, drawn ones too."""

    temperature: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """Temperature of the sampled answers."""
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Nucleus mass of the sampled answers."""
    top_k: NonNegative = 0
    """Most likely tokens kept for the sampled answers; 0 keeps all."""


class SamplesConfig(DrawConfig, frozen=True, kw_only=True):
    """How answers are generated, several a question."""

    num_samples: Positive = 1
    """Answers a question in all. Answer 0 is the deterministic one, the others are sampled."""
    trace_samples: bool = False
    """Trace the sampled answers too, each as a sample of its own."""


class SiteConfig(_Settings, frozen=True, kw_only=True):
    """What is recorded of whole texts."""

    sites: tuple[str, ...] = DEFAULT_SITES
    """Sites (see README) or groups: hidden attn qkv resid topk all none."""
    layers: tuple[str, ...] = ("all",)
    """Layers to keep: `all`, numbers (`0 12 -1`) or ranges (`4-8`). hidden_states counts the embeddings as 0."""
    store_dtype: Literal["same", "float32", "bfloat16", "float16", "float8", "int8"] = "same"
    """dtype of the stored tensors; `same` is what the model computes in. A value that overflows stops the run, in a
    damaged model becomes inf. `float8` (e4m3fn) and `int8` come with scales for channels and tokens of each layer of a
    sample and read as float32: a quarter of float32's bytes, with an error of a few percent and about one percent
    that is measured and written down; attention keeps the model's dtype."""
    num_replays: NonNegative = 2
    """Samples of the first and of the last batch of each shard that are run again alone, in plain eager transformers,
    and compared; of the batches between, rows that are padded more than any before are, too. 0 leaves all out."""

    @property
    def is_quantized(self) -> bool:
        """Whether tensors with channels are stored in few bits, with scales (tracekit.storage)."""
        from tracekit.storage import QUANTIZED_DTYPES  # numpy, which reading flags does without

        return self.store_dtype in QUANTIZED_DTYPES

    @property
    def whole(self) -> "CaptureConfig":
        """The same, of all positions."""
        return self if isinstance(self, CaptureConfig) else CaptureConfig(**msgspec.structs.asdict(self))


class CaptureConfig(SiteConfig, frozen=True, kw_only=True):
    """What is recorded."""

    tokens: Literal["all", "prompt", "answer", "last"] = "all"
    """Positions to keep: all, the prompt's, the answer's, or the last prompt token. For attention: query rows."""
    attention_top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Share of each attention row's mass to keep: the fewest largest weights that reach it, the others read as 0. 1
    keeps all. A kept weight takes its own bytes and two more."""
    topk: Positive = 5
    """k of the sites topk_ids and topk_logprobs."""
    numbers: Literal["all", "none"] = "all"
    """`none` leaves the language-model head out. Records then hold no log-probabilities, and the model stops after the
    last layer that is kept. Tasks whose records need them refuse it."""


class AnswerCaptureConfig(CaptureConfig, frozen=True, kw_only=True):
    """What is recorded of answers."""

    capture_from: Literal["auto", "decoding", "pass"] = "auto"
    """`decoding`: as the model computed it while it wrote the answers, at little more than their price; `pass`: in a
    pass over prompt and answer afterwards; `auto`: the first where the model proves on loading that both are equal.
    Answers of beam search, and texts longer than what was proven, are captured in a pass all the same."""


class ReadingConfig(CaptureConfig, frozen=True, kw_only=True):
    """What is recorded of texts to which nothing is added."""

    tokens: Literal["all", "prompt", "last"] = "all"
    """Positions to keep: all, the prompt's, which are the same, or the last. For attention: query rows."""


class OutputConfig(_Settings, frozen=True, kw_only=True):
    """Where it goes, in what pieces."""

    out: str | None = None
    """Folder of the dataset; a readable name under traces/ by default."""
    dataset_config: str | None = None
    """Name of the configuration inside the dataset; the task's name by default."""
    samples_per_shard: Positive = 256
    """Questions a shard."""
    batch_size: Positive | Literal["auto"] = "auto"
    """Questions a batch; `auto` fits the device. Halved when memory runs out. A folder that was begun goes on with a
    smaller one: its batches stay, and are computed in parts."""
    seed: int = 41
    """Seed of everything that is drawn."""
    dry_run: bool = False
    """Print the plan and write nothing."""
    force_run: bool = False
    """Delete what this run, begun with the same settings, has in the folder, and compute it anew."""


class PublishConfig(_Settings, frozen=True, kw_only=True):
    """Whether it goes to the Hub. Not part of the dataset: nothing of it is written down."""

    publish: str | None = None
    """Repository `owner/name` on the Hub to publish to: shards are sent while the run goes on."""
    version: str | None = None
    """Version to publish under, as `v1.0.0`."""
    private: bool = False
    """Create the repository as a private one."""
    free_local: bool = False
    """Delete each shard here once the Hub has it."""
    license: str | None = None
    """Licence of the published dataset, as the Hub writes it (`apache-2.0`, `cc-by-4.0`, ...)."""


class ClusterConfig(_Settings, frozen=True, kw_only=True):
    """Who does the work. Not part of the dataset: nothing of it is written down, and a run goes on with another."""

    engine: Literal["local", "ray"] = "local"
    """`local`: this process, or the ranks of a launcher; `ray`: workers on a Ray cluster, or on this machine."""
    num_workers: Positive | None = None
    """Workers on Ray, a model each; one a GPU by default, without GPUs one a node."""
    ray_address: str | None = None
    """`auto`, `host:6379` or `ray://host:10001`; by default RAY_ADDRESS, and without it a Ray on this machine alone."""
    gpus_per_worker: Positive = 1
    """GPUs of each worker, for a model larger than one."""
    worker_folder: str | None = None
    """Where workers make their shards before the Hub has them (--publish, --free-local), as a fast disk of their own.
    By default in the folder of the dataset, or in the same path on their own disk where they do not see it."""


class RunConfig(_Settings, frozen=True, kw_only=True):
    """A whole run. Tasks inherit from it: they have the sections that they use, with defaults of their own, and no
    others.

    `local_files` names settings of theirs that are paths of files: in the dataset stand name and hash instead.
    `local_models` names those that are models, which may be local. `stages_read` names, for each stage that runs no
    model, the settings that it reads.
    `not_recorded` names those that decide nothing of what is traced, as who judges it later: the dataset does not know
    them, and they may differ when a run goes on. `grows` names settings that may grow in a folder that is there, lists
    that get longer and numbers that get larger: the `index` of an example must not depend on them. `eases` names those
    that may be smaller than the folder's: its batches stay, and are computed in parts. `needs_numbers` says whether
    its records need what comes from the language-model head: `--numbers none` is refused then.
    """

    local_files: ClassVar[tuple[str, ...]] = ()
    local_models: ClassVar[tuple[str, ...]] = ()
    stages_read: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    not_recorded: ClassVar[tuple[str, ...]] = ()
    grows: ClassVar[tuple[str, ...]] = ()
    eases: ClassVar[tuple[str, ...]] = ("output.batch_size",)
    needs_numbers: ClassVar[bool] = True
    model: ModelConfig = ModelConfig()
    """Which model."""
    source: SourceConfig = SourceConfig()
    """Which data."""
    capture: SiteConfig = SiteConfig()
    """What is recorded."""
    output: OutputConfig = OutputConfig()
    """Where it goes."""
    publish: PublishConfig = PublishConfig()
    """Whether it goes to the Hub."""
    cluster: ClusterConfig = ClusterConfig()
    """Who does the work."""

    def settled(self) -> Self:
        """The same run, with settings that follow from others filled in: what is written down."""
        return self


class PromptedConfig(RunConfig, frozen=True, kw_only=True):
    """A run in which a model reads prompts."""

    prompt: PromptConfig = PromptConfig()
    """How a question becomes a prompt."""
    capture: CaptureConfig = CaptureConfig()
    """What is recorded."""


class AnswersConfig(PromptedConfig, frozen=True, kw_only=True):
    """A run in which a model answers questions, each once or several times."""

    grows: ClassVar[tuple[str, ...]] = ("source.limit",)
    generation: SamplesConfig = SamplesConfig()
    """How answers are generated."""
    capture: AnswerCaptureConfig = AnswerCaptureConfig()
    """What is recorded."""


ConfigT = TypeVar("ConfigT", bound=msgspec.Struct)
RunConfigT = TypeVar("RunConfigT", bound=RunConfig)


def check(config: ConfigT) -> ConfigT:
    """The same configuration, every bound and name checked.

    Raises:
        ConfigError: a value is refused; the message holds its path.
    """
    try:
        checked = msgspec.convert(msgspec.to_builtins(config), type(config))
    except msgspec.ValidationError as error:
        raise ConfigError(f"configuration: {error}") from error
    if isinstance(checked, RunConfig):
        checked = _with_files(checked)
        resolve_sites(checked.capture.sites)
        for layer in checked.capture.layers:
            if not re.fullmatch(r"all|-?\d+|\d+-\d+", layer):
                raise ConfigError(f"layer {layer!r} - at `$.capture.layers`; expected all, 12, -1 or 4-8")
        if isinstance(prompt := getattr(checked, "prompt", None), PromptConfig):
            template_kwargs(prompt)
        _check_adapter(checked.model)
        _check_capture(checked.capture)
        _check_numbers(checked)
        _check_placement(checked.model)
        name = checked.output.dataset_config
        if name is not None and not re.fullmatch(r"[A-Za-z0-9][\w-]*", name, re.ASCII):
            raise ConfigError(
                f"dataset name {name!r} - at `$.output.dataset_config`; letters, digits, '_' and '-' only"
            )
        _check_publish(checked.publish)
        _check_cluster(checked.cluster, checked.publish)
        split = checked.source.split
        if not re.fullmatch(r"\w+(\.\w+)*", split, re.ASCII) or split == "all":  # what `datasets` takes
            raise ConfigError(f"split {split!r} - at `$.source.split`; letters, digits and '_' only, and not 'all'")
    return checked


def _with_files(config: RunConfigT) -> RunConfigT:
    """The same, with local files that a dataset's command names by their SHA-256 where they lie here."""
    whole = msgspec.to_builtins(config)
    for path, value in settings_of(whole).items():
        named = re.fullmatch(r"(.+)@sha256:([0-9a-f]{64})", value) if isinstance(value, str) else None
        if named is None:
            continue
        from tracekit.format.shards import sha256_file

        file = Path(named[1]).expanduser()
        if not file.is_file() or sha256_file(file) != named[2]:
            why = "is another file" if file.is_file() else "is not here"
            raise ConfigError(
                f"{value!r} - at `$.{path}`; it names a local file by its SHA-256, and {named[1]!r} {why}; give the "
                "path of the file that has this SHA-256"
            )
        section, _, key = path.rpartition(".")
        (whole[section] if section else whole)[key] = str(file)
    return msgspec.convert(whole, type(config))


def load_toml(path: str, config_type: type[ConfigT]) -> ConfigT:
    """Read a configuration from a TOML file with one section a part; what it does not name is the task's default.

    Raises:
        ConfigError: no such file, not TOML, or a value is refused.
    """
    data = read_toml(path)
    try:
        return msgspec.convert(_over(msgspec.to_builtins(config_type()), data), config_type)
    except msgspec.ValidationError as error:
        found = settings_of(data)
        known = msgspec.to_builtins(config_type())
        sections = ", ".join(f"[{name}]" for name, value in known.items() if isinstance(value, dict))
        message = re.sub(r"field `(\w+)`(?: - at `\$(.*)`)?$", r"field `\1` - at `$\2.\1`", str(error))
        raise ConfigError(
            f"{located(message, Origins(found, file=path, in_file=found))}. Sections: {sections}"
        ) from error


def read_toml(path: str) -> dict[str, Any]:
    """What a TOML file says.

    Raises:
        ConfigError: no such file, or not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path!r} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path!r} is not TOML: {error}") from error


def _over(defaults: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Settings over defaults, section by section."""
    both = defaults | data
    for name in defaults.keys() & data.keys():
        if isinstance(defaults[name], dict) and isinstance(data[name], dict):
            both[name] = defaults[name] | data[name]
    return both


def template_kwargs(prompt: PromptConfig) -> dict[str, Any]:
    """The chat template's arguments: values are read as JSON where they are JSON, else as text.

    Raises:
        ConfigError: an entry has no `=`.
    """
    arguments: dict[str, Any] = {}
    for entry in prompt.template_kwargs:
        name, equals, value = entry.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(
                f"{entry!r} - at `$.prompt.template_kwargs`; expected name=value, as enable_thinking=false"
            )
        try:
            arguments[name] = msgspec.json.decode(value)
        except msgspec.DecodeError:
            arguments[name] = value
    return arguments


def memory_limits(model: ModelConfig) -> dict[int | str, int]:
    """Bytes that weights may take by device: numbers of accelerators, `mps` or `cpu`; empty where nothing is set.

    Raises:
        ConfigError: an entry is no device and size, or a device is named twice.
    """
    limits: dict[int | str, int] = {}
    for entry in model.max_memory:
        name, _, size = entry.partition("=")
        num_bytes = parse_size(size)
        if not (name.isdecimal() or name in ("cpu", "mps")) or num_bytes is None:
            raise ConfigError(
                f"{entry!r} - at `$.model.max_memory`; expected DEVICE=SIZE, the device being the number of an "
                "accelerator, cpu or mps, as in 0=20GiB cpu=60GiB"
            )
        device = int(name) if name.isdecimal() else name
        if device in limits:
            raise ConfigError(f"{entry!r} - at `$.model.max_memory`; {name} is named twice")
        limits[device] = num_bytes
    return limits


def _check_placement(model: ModelConfig) -> None:
    limits = memory_limits(model)
    if model.device_map == "none" and (limits or model.offload_folder is not None):
        name = "max_memory" if limits else "offload_folder"
        raise ConfigError(
            f"--{name.replace('_', '-')} says how a model is shared out, and goes with --device-map; add --device-map "
            f"auto - at `$.model.{name}`"
        )
    if model.device_map != "none" and model.device != "auto":
        raise ConfigError(
            f"--device {model.device} with --device-map {model.device_map} - at `$.model.device`; the first puts the "
            "whole model on one device, the second shares it out; leave one out (--max-memory says which devices)"
        )


def _check_adapter(model: ModelConfig) -> None:
    if model.merge_adapter and model.adapter is None:
        raise ConfigError("--merge-adapter - at `$.model.merge_adapter`; there is no adapter; give --adapter")
    if model.merge_adapter and model.quantize != "none":
        raise ConfigError(
            f"--merge-adapter with --quantize {model.quantize} - at `$.model.merge_adapter`; weights that are "
            "quantised would be rounded anew; leave one of the two out"
        )


def _check_capture(capture: SiteConfig) -> None:
    if capture.is_quantized and capture.whole.tokens == "last":
        raise ConfigError(
            f"--store-dtype {capture.store_dtype} with --tokens last - at `$.capture.store_dtype`; of a single token "
            "every value has a scale of its own, which takes more room than float32; use --store-dtype bfloat16"
        )


def _check_numbers(config: RunConfig) -> None:
    if not isinstance(config.capture, CaptureConfig) or config.capture.numbers == "all":
        return
    if config.needs_numbers:
        raise ConfigError(
            "--numbers none - at `$.capture.numbers`; the records of this task need the log-probabilities of the "
            "language-model head, which cannot be null; leave --numbers out"
        )
    check_head_sites(config.capture)


def check_head_sites(capture: CaptureConfig) -> None:
    """See that no site comes from the language-model head where that is left out.

    Raises:
        ConfigError: one does.
    """
    from_head = [site for site in resolve_sites(capture.sites) if SITES[site].source == "head"]
    if capture.numbers == "none" and from_head:
        raise ConfigError(
            f"--numbers none with --sites {' '.join(capture.sites)} - at `$.capture.numbers`; {', '.join(from_head)} "
            "come from the language-model head, which it leaves out; name other sites (hidden attn qkv resid), or "
            "leave --numbers out"
        )


def _check_publish(publish: PublishConfig) -> None:
    if publish.publish is not None and publish.version is None:
        raise ConfigError("--publish needs --version, as in --version v1.0.0 - at `$.publish.publish`")
    others = publish.version is not None or publish.free_local or publish.private or publish.license is not None
    if publish.publish is None and others:
        raise ConfigError(
            "--version, --private, --free-local and --license go with --publish owner/name - at `$.publish`"
        )
    if publish.version is not None:
        from tracekit.format.release import Version

        Version.parse(publish.version)


def _check_cluster(cluster: ClusterConfig, publish: PublishConfig) -> None:
    if cluster.engine == "local" and cluster != ClusterConfig():
        raise ConfigError(
            "--num-workers, --ray-address, --gpus-per-worker and --worker-folder - at `$.cluster`; they go with "
            "--engine ray"
        )
    if cluster.worker_folder is not None and not publish.free_local:
        raise ConfigError(
            f"--worker-folder {cluster.worker_folder!r} - at `$.cluster.worker_folder`; shards made there go to the "
            "Hub: --publish owner/name --version v1.0.0 --free-local"
        )
