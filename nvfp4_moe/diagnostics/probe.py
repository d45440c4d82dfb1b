"""The largest |x| that enters each linear layer at run time, for check_checkpoint(activations=)."""

import torch
from torch import nn


class ActivationProbe:
    """with ActivationProbe(model) as probe: model(real_data) ..  then check_checkpoint(path,
    activations=probe.amax)

    Module names are the model's, which for a Hugging Face model are the checkpoint's."""

    def __init__(self, model: nn.Module, kinds: tuple[type, ...] = (nn.Linear,)):
        self.modules = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
        self._largest: dict[str, torch.Tensor] = {}
        self._hooks: list = []

    @property
    def amax(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._largest.items()}

    def __enter__(self) -> "ActivationProbe":
        self._hooks = [m.register_forward_pre_hook(self._hook(name)) for name, m in self.modules.items()]
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str):
        def measure(_module, inputs) -> None:
            x = inputs[0].detach()
            if x.numel():
                largest = x.abs().amax().float()  # stays on the device: no sync in the model's way
                seen = self._largest.get(name)
                self._largest[name] = largest if seen is None else torch.maximum(seen, largest)

        return measure
