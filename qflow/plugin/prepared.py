"""A model that the plugin has prepared and calibrated: how it runs, its dtypes, its scales, its outputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import DeQuantStub

from qflow.core.temporary import TemporaryFolder
from qflow.plugin.check_file import CheckedModule, read_check
from qflow.plugin.public import Public, short
from qflow.plugin.stubs import Stubbed, has_stubs
from qflow.quant.trace.calling import call_model

CHECK = "model_check_result.txt"


@dataclass
class PluginModel:
    """A model of the plugin."""

    public: Public
    model: nn.Module
    modules: Mapping[str, CheckedModule]
    """What the plugin's check says of each module, by its name in the prepared model."""

    def calibrate(self, batches: Iterable[tuple[Any, int]]) -> None:
        """Let the plugin's observers see `batches` of (model inputs, batch size)."""
        public = self.public
        self.model.eval()  # before the state is set: afterwards it would stop the observers
        public.call("set_fake_quantize", self.model, public["FakeQuantState"].CALIBRATION)
        with torch.no_grad():
            for inputs, _ in batches:
                with public.logged("model", f"calibration batch {short(inputs)}"):
                    call_model(self.model, inputs)
        self.model.eval()
        public.call("set_fake_quantize", self.model, public["FakeQuantState"].VALIDATION)

    @cached_property
    def quantizers(self) -> dict[str, tuple[str, Tensor]]:
        """`<module> output` or `<module> weight` -> path and scale of its quantizer, read from the state dict."""
        found = {}
        for key, value in self.model.state_dict().items():
            path, _, name = key.rpartition(".")
            module, _, slot = path.rpartition(".")
            if name == "scale" and isinstance(value, Tensor) and "input" not in slot and module:
                found[f"{module} {'weight' if 'weight' in slot else 'output'}"] = (path, value.detach().cpu().float())
        return found

    @property
    def state(self) -> Any:
        """Dtypes and scales as plain values."""
        scales = {
            key: value.flatten().tolist() for key, value in self.model.state_dict().items() if key.endswith(".scale")
        }
        dtypes = [[m.name, str(m.output), str(m.weight)] for m in self.modules.values()]
        return {"plugin": self.public.version, "scales": scales, "dtypes": dtypes}

    def outputs(self, names: Mapping[str, str], inputs: Any) -> dict[str, Tensor]:
        """Return the quantized output of each module of `names` (key -> module) in its first call on `inputs`."""
        own, seen, handles = dict(self.model.named_modules()), dict[str, Tensor](), []

        def keep(key: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: Any, out: Any) -> None:
                if isinstance(out, Tensor):
                    seen.setdefault(key, out.detach())

            return hook

        for key, name in names.items():
            path = self.quantizers.get(f"{name} output", (name, None))[0]
            if path in own:
                handles.append(own[path].register_forward_hook(keep(key)))
        try:
            with torch.no_grad():
                call_model(self.model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        return seen


def stubbed(public: Public, model: nn.Module, example: Any) -> nn.Module:
    """Return `model` if the user has placed stubs in it, else the model between stubs."""
    if has_stubs(model):
        return model
    return Stubbed(model, example, public["QuantStub"], public.find("DeQuantStub") or DeQuantStub)


def prepared_by_plugin(
    public: Public, model: nn.Module, example: Any, qconfigs: Mapping[str, Any], march: str
) -> PluginModel:
    """Prepare `model`, which has stubs, under `qconfigs` (module name -> QConfig); other modules get the default.

    prepare writes its check file into the working folder, so that it runs in a temporary one.
    """
    public.call("set_march", march)
    setters = (public.call("ModuleNameQconfigSetter", dict(qconfigs)), public["default_calibration_qconfig_setter"])
    inputs = {"example_kw_inputs": dict(example)} if isinstance(example, Mapping) else {"example_inputs": example}
    with TemporaryFolder() as folder, _inside(folder):
        made = public.call("prepare", model.eval(), qconfig_setter=setters, **inputs)
        made.eval()
        public.call("check_qat_model", made, **inputs, save_results=True, out_dir=".")
        text = (Path(folder) / CHECK).read_text(encoding="utf-8")
    return PluginModel(public, made, read_check(text))


@contextmanager
def _inside(folder: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
