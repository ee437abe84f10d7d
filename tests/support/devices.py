"""A second device that every machine has: its tensors are on the CPU, and torch refuses to mix them with others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

CPU, SECOND = torch.device("cpu"), torch.device("xpu:1")
_TAKES_CPU_INDICES = ("__getitem__", "__setitem__")


class SecondDevice(TorchFunctionMode):
    """While it is entered, tensors can be moved to `SECOND`, and no function takes tensors of both devices."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = WeakIdKeyDictionary()

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor in self.tensors

    def take(self, module: torch.nn.Module) -> None:
        """Move a part of a model, whose inputs follow it from then on."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.tensors[tensor] = True
        self.let_inputs_follow(module, SECOND)

    def let_inputs_follow(self, module: torch.nn.Module, device: torch.device) -> None:
        """Move the inputs of a part of a model to its device, as accelerate does."""

        def moved(value: Any) -> Any:
            return value.to(device) if isinstance(value, torch.Tensor) else value

        forward = module.forward

        def forward_there(*args: Any, **kwargs: Any) -> Any:
            return forward(*map(moved, args), **{name: moved(value) for name, value in kwargs.items()})

        module.__dict__["forward"] = forward_there  # a bridge would hand the attribute on to what it wraps

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == torch.Tensor.device.__get__:
            return SECOND if self.holds(args[0]) else args[0].device
        if name in ("to", "cpu"):
            return self._moved(func, args, kwargs)
        if name == "numpy" and self.holds(args[0]):
            raise TypeError("can't convert a tensor of another device to numpy; use .cpu() first")
        is_made_here = _names_second(kwargs.get("device"))
        if is_made_here:
            kwargs["device"] = CPU
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        here = [tensor for tensor in tensors if self.holds(tensor)]
        others = [tensor for tensor in tensors if not self.holds(tensor) and tensor.ndim]
        if name in _TAKES_CPU_INDICES and self.holds(args[0]):
            others = []
        if here and others and name not in ("copy_", "__set__", "__get__"):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} got some on {SECOND} and some on {CPU}"
            )
        result = func(*args, **kwargs)
        if here or is_made_here:
            self._mark(result)
        return result

    def _moved(self, func: Callable, args: Any, kwargs: dict[str, Any]) -> Any:
        tensor, *rest = args
        to_second = self.holds(tensor) and func.__name__ != "cpu"
        targets = [*rest, *([kwargs.pop("device")] if "device" in kwargs else [])]
        kept: list[Any] = []
        for target in targets:
            if isinstance(target, torch.Tensor):
                to_second = self.holds(target)
                kept.append(target.dtype)
            elif isinstance(target, str | torch.device):
                to_second = _names_second(target)
            elif target is not None:
                kept.append(target)
        kwargs.pop("non_blocking", None)
        result = tensor.to(*kept, **kwargs) if kept or kwargs else tensor
        if to_second != self.holds(tensor) and result is tensor:
            result = tensor.clone()
        if to_second:
            self._mark(result)
        return result

    def _mark(self, result: Any) -> None:
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.tensors[leaf] = True


def _names_second(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device) == SECOND


@contextmanager
def later_layers_on_second_device(model: Any, first: int) -> Iterator[SecondDevice]:
    """A context in which a model's blocks from `first` on and its final norm are on the second device.

    Its unembedding too, unless it shares its weights with the embedding, which stays where it is.
    """
    with SecondDevice() as device:
        for part in (*list(model.blocks)[first:], model.ln_final):
            device.take(part)
        tied = {id(parameter) for parameter in model.embed.parameters()}
        if tied.isdisjoint(map(id, model.unembed.parameters())):
            device.take(model.unembed)
        else:
            device.let_inputs_follow(model.unembed, CPU)
        yield device
