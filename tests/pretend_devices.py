"""Accelerators that are not there: tensors that say they lie on `cuda:0` or `cuda:1`, hold their values on the CPU, and
refuse to meet a tensor of another device as torch does.

    with PretendDevices():
        shared_out = spread(model, {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, ...})

`spread` does to a model what accelerate's `dispatch_model` does with a device map of accelerators.
"""

from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Far", "PretendDevices", "spread"]

_MOVES = {"to", "cuda", "cpu", "copy_"}


class Far(torch.Tensor):
    """A tensor on a device that is not there. Works only inside PretendDevices."""

    local: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, local: Tensor, place: torch.device) -> "Far":
        far = torch.Tensor._make_wrapper_subclass(cls, local.shape, dtype=local.dtype, device=place)  # type: ignore[attr-defined]
        far.local, far.place = local, place
        return far

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} on a pretended device, past PretendDevices")


class PretendDevices(TorchFunctionMode):
    """While open, torch knows any number of accelerators. Every operation runs on the CPU and its result says where it
    would lie.

    Raises:
        RuntimeError: tensors of several devices met.
    """

    num_moved = 0
    """Tensors that went from one device to another."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        places = {value.place for value in tree_leaves((args, kwargs)) if isinstance(value, Far)}
        if name == "__get__" and func in _PLACES:
            return _PLACES[func](args[0]) if places else func(*args, **kwargs)
        if name in _MOVES or "device" in kwargs:
            return self._move(func, name, args, kwargs)
        if not places:
            return func(*args, **kwargs)
        on_host = [
            value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor) and not isinstance(value, Far)
        ]
        is_index = name == "__getitem__" and isinstance(args[0], Far)
        if len(places) > 1 or (any(value.dim() for value in on_host) and not is_index):
            raise RuntimeError(f"{name}: tensors on {sorted(map(str, places))} and {len(on_host)} on the cpu met")
        if name == "numpy":
            raise TypeError("can't convert a tensor of an accelerator to numpy")
        return _run(func, args, kwargs, places.pop())

    def _move(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        if name == "copy_":
            _local(args[0]).copy_(_local(args[1]))
            return args[0]
        given = [kwargs.pop("device", None), *(args[1:2] if name in _MOVES else ())]
        target = torch.device("cpu") if name == "cpu" else next((d for d in map(_device, given) if d is not None), None)
        if target is None:
            place = args[0].place if isinstance(args[0], Far) else None
            return func(*args, **kwargs) if place is None else _run(func, args, kwargs, place)
        if name in ("to", "cpu", "cuda"):
            self.num_moved += getattr(args[0], "place", torch.device("cpu")) != target
            dtypes = [value for value in (*args[1:], kwargs.get("dtype")) if isinstance(value, torch.dtype)]
            value = _local(args[0]).to(*dtypes[:1]) if dtypes else _local(args[0])
            same = getattr(args[0], "place", torch.device("cpu")) == target and value is _local(args[0])
            return args[0] if same else value.clone() if target.type == "cpu" else Far(value.clone(), target)
        if target.type != "cuda":
            kwargs["device"] = target
        return _run(func, args, kwargs, target)


_PLACES: dict[Any, Any] = {
    torch.Tensor.device.__get__: lambda far: far.place,  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__: lambda far: True,  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: lambda far: False,  # type: ignore[attr-defined]
    torch.Tensor.is_meta.__get__: lambda far: False,  # type: ignore[attr-defined]
}


def _device(given: Any) -> torch.device | None:
    if isinstance(given, Far):
        return given.place
    if isinstance(given, bool) or not isinstance(given, str | int | torch.device):
        return None
    return torch.device("cuda", given) if isinstance(given, int) else torch.device(given)


def _local(value: Any) -> Any:
    if isinstance(value, slice):
        return slice(_local(value.start), _local(value.stop), _local(value.step))
    return value.local if isinstance(value, Far) else value


def _run(func: Any, args: Any, kwargs: dict[str, Any], place: torch.device) -> Any:
    """Run on the CPU; results are on the device, what was changed in place is the tensor that it was."""
    known = {id(value.local): value for value in tree_leaves((args, kwargs)) if isinstance(value, Far)}
    mine, named = tree_map(_local, args), tree_map(_local, kwargs)
    if func is torch.histc:  # the CPU counts floats alone, and models count experts as integers elsewhere
        mine = (mine[0].float(), *mine[1:])
    output = func(*mine, **named)

    def far(value: Any) -> Any:
        if not isinstance(value, Tensor) or place.type != "cuda":
            return value
        return known[id(value)] if id(value) in known else Far(value, place)

    return tree_map(far, output)


class _Hook(AlignDevicesHook):
    """accelerate's, for modules that are where they should be already."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module


def spread(model: Any, device_map: dict[str, int]) -> Any:
    """The model, its weights and buffers on pretended accelerators, and accelerate's hooks on its modules."""
    first = torch.device("cuda", next(iter(device_map.values())))
    add_hook_to_module(model, _Hook(first, io_same_device=True))
    for path, number in device_map.items():
        place = torch.device("cuda", number)
        skip = getattr(model, "_skip_keys_device_placement", None)
        for module in model.get_submodule(path).modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and not isinstance(parameter, Far):
                    module._parameters[name] = nn.Parameter(Far(parameter.data, place), requires_grad=False)
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = Far(buffer, place)
            if not hasattr(module, "_hf_hook"):
                add_hook_to_module(module, _Hook(place, skip_keys=skip))
    model.hf_device_map = device_map
    return model
