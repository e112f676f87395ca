"""Checkpoints of pruned models with adapters of PEFT, such as LoRA.

`save_pretrained` of such a model saves the adapters alone, and the base model is saved beside them. The configuration
must describe the base model, and the configurations of the adapters must build the adapters on it.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from kirsch.errors import error_text
from kirsch.frameworks.pytorch.inference.predict import run
from kirsch.frameworks.pytorch.modules.copying import copy_of
from kirsch.frameworks.pytorch.modules.tuners import base_model_of, without_tuners
from kirsch.frameworks.pytorch.transformers.blueprint import build, quiet
from kirsch.frameworks.pytorch.verification.distance import distance
from kirsch.frameworks.pytorch.verification.noise import Noise, seeded

if TYPE_CHECKING:
    from torch import nn


def saving_note(model: nn.Module) -> str:
    """Return a sentence on how a model with adapters and its base model are saved."""
    alone = "The model has adapters, and its save_pretrained saves them alone."
    if not hasattr(model, "get_base_model"):  # the method add_adapter of transformers has no way back
        return f"{alone} kirsch.save saves model and adapters."
    return f"{alone} Save the base model beside them: copy.deepcopy(model).unload().save_pretrained(folder)."


def copy_base_configurations(base: nn.Module, model: nn.Module) -> None:
    """Set the configurations of a model with adapters to those of its base model.

    Args:
        base: `without_tuners(model)`, with new configurations.
        model: the model with adapters.
    """
    inner = base_model_of(model)
    old, new = vars(inner).get("config"), vars(base).get("config")
    for path, module in base.named_modules():
        if "config" in vars(module):
            inner.get_submodule(path).config = module.config
    for module in model.modules():
        if old is not None and vars(module).get("config") is old:
            module.config = new  # type: ignore[assignment]  # an object, not a module


def adapter_difference(model: nn.Module, args: Any, options: Any) -> str:
    """Return how adapters that are loaded on the base model differ from those of a pruned model; "" if not at all.

    The base model and the adapters are built again from their configurations, and get the same tensors. The outputs
    must then be bit-identical. Noise is added to the tensors, because an adapter that was not trained adds zeros.
    """
    noise = Noise(model)
    copied = copy_of(model).eval()
    with quiet():
        try:
            built = build(without_tuners(model), {}, next(model.parameters()).device)
            loaded = _with_adapters(built, model).eval()
            state = {
                name: value.detach() + noise[id(value)].to(value) if id(value) in noise else value
                for name, value in model.state_dict(keep_vars=True).items()
            }
            copied.load_state_dict(state)
            loaded.load_state_dict(state)
            if distance(seeded(lambda: run(copied, args, options)), seeded(lambda: run(loaded, args, options))) != 0:
                return "the outputs differ"
        except Exception as error:  # noqa: BLE001 - the code of the model and of PEFT can raise any exception
            return error_text(error).rstrip(".")
    return ""


def _with_adapters(base: nn.Module, model: nn.Module) -> nn.Module:
    """Return a base model with adapters from the configurations of the adapters of a model."""
    owner: Any = model
    configurations = {name: copy.deepcopy(value) for name, value in owner.peft_config.items()}
    for configuration in configurations.values():
        if hasattr(configuration, "init_lora_weights"):
            configuration.init_lora_weights = True  # other initializations may change the base model
    result: Any = base
    for name, configuration in configurations.items():
        if base_model_of(model) is not model and result is base:
            result = type(model)(base, configuration, adapter_name=name)
        elif base_model_of(model) is not model:
            result.add_adapter(name, configuration)
        else:
            result.add_adapter(configuration, name)
    active = owner.base_model.active_adapters if base_model_of(model) is not model else owner.active_adapters()
    (result.base_model if base_model_of(model) is not model else result).set_adapter(active)
    return result  # type: ignore[no-any-return]  # of an untyped library
