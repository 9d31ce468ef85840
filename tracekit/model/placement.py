"""Placement: on which devices the weights of a model lie, and which of them compute.

    --device cuda:1                     all of it on one device
    --device-map auto                   shared out by accelerate: accelerators first, then host memory, then the disk
    --max-memory 0=20GiB cpu=60GiB      at most so much of each, and nothing anywhere else
    --offload-folder DIR                what fits into no memory may stay on the disk

Beside an accelerator, weights in host memory or on the disk are offloaded: a module's weights come to the accelerator
when it runs, and go afterwards. Without an accelerator the host computes, and only what is on the disk is offloaded.

An offloaded weight has no values between its module's runs. Code that reads it then, past the module, would compute
with whatever lies in memory: `watch_offloaded` finds that while a model proves itself, and the model is refused.
"""

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import PrefixedDataset
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tracekit.config import ModelConfig, memory_limits
from tracekit.errors import ConfigError, ModelError
from tracekit.model.memory import is_out_of_memory
from tracekit.ranks import has_own_devices, this_rank

__all__ = [
    "computing_device",
    "devices_of",
    "input_device",
    "is_offloaded",
    "loading_arguments",
    "resolve_device",
    "settle",
    "watch_offloaded",
]


def resolve_device(device: str) -> torch.device:
    """The device a name stands for; `auto` and `cuda` give each rank on a machine an accelerator of its own.

    Raises:
        ConfigError: no such device here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and torch.cuda.device_count() > 1 and (rank := this_rank()).world_size > 1:
        device = f"cuda:{rank.local_number % torch.cuda.device_count()}"
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {device!r} - at `$.model.device`; torch cannot use it here: {error}") from error
    return found


def computing_device(config: ModelConfig) -> torch.device:
    """The device that computes, of several the first; known before anything is loaded.

    Raises:
        ConfigError: no such device here, or several ranks that would share out a model over the same devices.
    """
    if config.device_map == "none":
        return resolve_device(config.device)
    if not has_own_devices():
        raise ConfigError(
            f"--device-map {config.device_map} in {this_rank().world_size} processes - at `$.model.device_map`; each "
            "would take all devices. Give each its own: srun --gpus-per-task N, one process a machine, or processes "
            "started by hand with CUDA_VISIBLE_DEVICES and LOCAL_WORLD_SIZE=1 beside RANK and WORLD_SIZE"
        )
    limits = memory_limits(config)
    count = torch.cuda.device_count()
    missing = [n for n in limits if (isinstance(n, int) and n >= count) or (n == "mps" and not _has_mps())]
    if missing:
        raise ConfigError(
            f"{missing[0]} - at `$.model.max_memory`; this machine has no such accelerator ("
            + (f"0 to {count - 1}" if count else "mps" if _has_mps() else "none")
            + ", and cpu)"
        )
    if not limits:
        return resolve_device("auto")
    computing = [name for name, size in limits.items() if name != "cpu" and size > 0]
    numbers = [name for name in computing if isinstance(name, int)]
    return torch.device("cuda", min(numbers)) if numbers else torch.device("mps" if computing else "cpu")


def _places(paths: list[str]) -> str:
    """Modules in words."""
    if paths == [""]:
        return "the whole model"
    return repr(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


@contextmanager
def loading_arguments(config: ModelConfig) -> Iterator[dict[str, Any]]:
    """While a model is loaded: what `from_pretrained` is given, nothing where one device has the whole model.

    Some architectures hold their weights in another form than the checkpoint; those on the disk are then written anew,
    in a folder of this model's own under `offload_folder`, since two models may have weights of one name. `settle` has
    it deleted with the model.

    Raises:
        ConfigError: `offload_folder` cannot be written to.
    """
    if config.device_map == "none":
        yield {}
        return
    arguments: dict[str, Any] = {"device_map": config.device_map, "max_memory": memory_limits(config) or None}
    if config.offload_folder is None:
        yield arguments
        return
    try:
        Path(config.offload_folder).expanduser().mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix="tracekit-", dir=Path(config.offload_folder).expanduser())
    except OSError as error:
        raise ConfigError(f"--offload-folder {config.offload_folder!r} cannot be written to: {error}") from error
    try:
        yield arguments | {"offload_folder": folder}
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def settle(model: Any, config: ModelConfig, name: str, *, missing: Iterable[str], folder: str | None) -> None:
    """See that a model was put where it can be computed with; `missing` are weights that its checkpoint does not have,
    `folder` is what it may use of the disk.

    Raises:
        ModelError: weights fit into no memory and there is no folder; part of a module, or a weight that no file has,
            would lie on the disk; there is an adapter beside weights that are offloaded; or another device computes
            than `computing_device` says.
    """
    if folder is not None:
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    where: dict[str, Any] = getattr(model, "hf_device_map", {})
    places = {str(place) for place in where.values()}
    if len(places) < 2 and "disk" not in places:
        vars(model).pop("hf_device_map", None)  # one device has it all; peft would share it out anew
    expected, found = computing_device(config).type, input_device(model).type
    if found != expected:
        raise ModelError(
            f"{name}: no layer fits on an accelerator, so that {found} would compute and not {expected}. Give "
            "accelerators more with --max-memory, or leave them out of it"
        )
    on_disk = [path for path, place in where.items() if place == "disk"]
    if on_disk and folder is None:
        raise ModelError(
            f"{name}: weights fit into no memory that they may use: {_places(on_disk)}. "
            "Raise --max-memory, or give --offload-folder DIR to have them read from the disk in every pass (slow)"
        )
    modules = {path for path, _ in model.named_modules()}
    if parts := [path for path in on_disk if path not in modules]:
        raise ModelError(
            f"{name}: {parts[0]!r} would lie on the disk apart from the rest of its module, and accelerate brings back "
            f"whole modules ({model.config.model_type} does not say which to keep whole). Raise --max-memory"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if drawn := sorted(path for path in missing if path in parameters and parameters[path].is_meta):
        raise ModelError(
            f"{name}: the checkpoint has no {drawn[0]!r}, and what is drawn at random cannot be read from the disk. "
            "Raise --max-memory, or give a checkpoint saved with its head"
        )
    if config.adapter is not None and is_offloaded(model):
        raise ModelError(
            f"{name}: --adapter, and weights that are offloaded to {' and '.join(sorted(places & {'cpu', 'disk'}))}: "
            "peft would share the model out anew. Merge the adapter into a checkpoint first, or give more memory"
        )
    if folder is not None:
        _align(model, folder)


def is_offloaded(model: Any) -> bool:
    """Whether some weights have values only while their module runs."""
    return any(parameter.is_meta for parameter in model.parameters())


def input_device(model: Any) -> torch.device:
    """The device that inputs go to: where the first module computes, wherever its weights lie."""
    embeddings = model.get_input_embeddings()
    for module in (model, embeddings):
        for hook in _hooks(module):
            if hook.execution_device is not None:
                return _as_device(hook.execution_device)
    return embeddings.weight.device


def devices_of(model: Any) -> list[torch.device]:
    """Devices whose memory holds weights or what is computed, in order, that of the inputs first."""
    places = getattr(model, "hf_device_map", {}).values()
    others = {_as_device(place) for place in places if place != "disk"}
    first = input_device(model)
    return [first, *sorted(others - {first}, key=lambda device: (device.type == "cpu", device.index or 0))]


def _as_device(place: Any) -> torch.device:
    """A device as accelerate writes it: accelerators are bare numbers."""
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def _hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """What accelerate does around a module's forward pass."""
    hook = getattr(module, "_hf_hook", None)
    return [one for one in getattr(hook, "hooks", [hook]) if isinstance(one, AlignDevicesHook)]


class _Aligned(Mapping[str, Any]):
    """Weights by name, as another mapping reads them; those whose file is in a folder in memory of torch's own.

    Kernels for the CPU round by where memory begins. A checkpoint's file is mapped here as it is when a model is loaded
    whole; what was written anew would be in memory of torch's own then, and begins anywhere in its file.
    """

    def __init__(self, weights: PrefixedDataset, folder: str) -> None:
        loader: Any = weights.dataset
        self._weights, self._index, self._folder = weights, loader.index, Path(folder)

    def __getitem__(self, name: str) -> Any:
        weight = self._weights[name]
        place = self._index.get(self._weights.prefix + name, {})
        return weight.clone() if self._folder in Path(place.get("safetensors_file", "")).parents else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _align(model: nn.Module, folder: str) -> None:
    """Have weights that the host computes with lie in memory as they do where it has all of them."""
    for module in model.modules():
        for hook in _hooks(module):
            if isinstance(hook.weights_map, PrefixedDataset) and str(hook.execution_device) == "cpu":
                hook.weights_map = _Aligned(hook.weights_map, folder)


class _EmptyWeightsGuard(TorchDispatchMode):
    """Refuses operations that make values of a tensor which has none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if _has(output, is_meta=False) and (_has(args, is_meta=True) or _has(kwargs, is_meta=True)):
            raise ModelError(f"weights that are offloaded are read past the module that they belong to, by {func}")
        return output


def _has(values: Any, *, is_meta: bool) -> bool:
    return any(isinstance(value, Tensor) and value.is_meta == is_meta for value in tree_leaves(values))


@contextmanager
def watch_offloaded(model: Any, name: str) -> Iterator[None]:
    """While open, a pass that reads an offloaded weight which is not there at the time stops.

    Raises:
        ModelError: there was such a pass; or the model does not run shared out, whatever the reason.
    """
    if not hasattr(model, "hf_device_map"):
        yield
        return
    advice = "Give it memory enough for all weights (--max-memory), or one device (--device)"
    try:
        with _EmptyWeightsGuard() if is_offloaded(model) else nullcontext():
            yield
    except RuntimeError as error:  # torch's own, for tensors on different devices or without values
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{name} does not run shared out over devices: {reason}. {advice}") from error
