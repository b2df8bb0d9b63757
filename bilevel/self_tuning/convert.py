"""From a plain module to a self-tuning one, and back."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from bilevel.checks import did_you_mean
from bilevel.self_tuning.attention import ResponseAttention
from bilevel.self_tuning.dropout import SHARED, TunedDropout
from bilevel.self_tuning.layers import (
    Response,
    ResponseConv1d,
    ResponseConv2d,
    ResponseEmbedding,
    ResponseLinear,
)
from bilevel.self_tuning.layout import Layout
from bilevel.self_tuning.perturbation import Perturbation
from bilevel.self_tuning.recurrent import ResponseGRU, ResponseLSTM, _Recurrent

__all__ = ["Converted", "convert"]

KINDS: dict[type[nn.Module], type[Response]] = {
    nn.Linear: ResponseLinear,
    NonDynamicallyQuantizableLinear: ResponseLinear,
    nn.Conv1d: ResponseConv1d,
    nn.Conv2d: ResponseConv2d,
    nn.Embedding: ResponseEmbedding,
    nn.LSTM: ResponseLSTM,
    nn.GRU: ResponseGRU,
    nn.MultiheadAttention: ResponseAttention,
}
"""Layers that get a response.  Subclasses stay as they are: their forward is their own."""

Names = Mapping[str, "str | tuple[str, int]"]
"""Path of a module -> name of a hyperparameter, or (name, index) for an element of it."""


@dataclass(frozen=True)
class Converted:
    """A self-tuning copy of a module.

    Attributes:
        module: the copy; it computes what the plain module does until `perturbation` is active.
        perturbation: what its layers respond to.
        layers: the response layers by path, and recurrent ones that only carry tangents.
        tied: paths of response layers that share a parameter, group by group.
    """

    module: nn.Module
    perturbation: Perturbation
    layers: dict[str, Response]
    tied: tuple[tuple[str, ...], ...]

    def response_shapes(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Return shape and fan-in of all responses and gates by name."""
        return {
            f"{path}.{key}" if path else key: found
            for path, layer in self.layers.items()
            for key, found in layer.response_shapes().items()
        }

    def rates(self) -> dict[str, tuple[str, int | None]]:
        """Return the hyperparameter of each tuned dropout layer, (name, index) by path."""
        found = {}
        for path, layer in self.module.named_modules():
            if isinstance(layer, TunedDropout):
                found[path] = layer.key
            elif isinstance(layer, _Recurrent) and layer.between is not None:
                found[path] = layer.between
        return found

    def export(self) -> nn.Module:
        """Return a plain copy of the module, with the values that its parameters have now.

        Tuned dropout layers have the rates of the last call; weights dropped by DropConnect are
        whole again.
        """
        clone = copy.deepcopy(self.module)
        for module in clone.modules():
            if isinstance(module, Response | TunedDropout):
                module.detach()
        return clone


def convert(
    module: nn.Module,
    layout: Layout,
    *,
    plain: Collection[str] = (),
    dropout: Names | None = None,
    dropconnect: Names | None = None,
) -> Converted:
    """Return a copy of a module whose weights respond to hyperparameters.

    Linear, Conv1d, Conv2d, Embedding, LSTM, GRU and MultiheadAttention get a response; frozen
    parameters, affine norms and all other layers stay as they are.

    Args:
        module: the plain module; it is not changed.
        layout: of λ.
        plain: paths of layers that shall not respond; they train as they are.
        dropout: path of a Dropout, Dropout1d, Dropout2d or LockedDropout -> its rate.  The path
            of an LSTM or GRU stands for the dropout between its layers.
        dropconnect: path of a response layer -> rate at which its weights are dropped: entries
            of a weight, hidden-to-hidden weights of an LSTM or GRU, whole rows of an embedding.

    Raises:
        ValueError: no layer can respond; an unknown path or name; a rate that can reach 1; a
            rate per example for weights, which all examples share; a layer with options that
            are not supported (says which).
    """
    _check_supported(module)
    clone = copy.deepcopy(module)
    perturbation = Perturbation()
    found = dict(clone.named_modules())
    for path in plain:
        if path not in found:
            raise ValueError(f"plain: no module {path!r}; {did_you_mean(path, found)}")
    layers: dict[str, Response] = {}
    for path, layer in found.items():
        kind = KINDS.get(type(layer))
        own = [p for p in layer.parameters(recurse=False) if p.requires_grad]
        respond = bool(own) and path not in plain
        if kind is None or not (respond or (_recurrent(kind) and not _options(layer))):
            continue
        # A recurrent layer without a response carries the tangents of those before it.
        _check_layer(path, layer)
        before = type(layer)
        layer.__class__ = kind
        assert isinstance(layer, Response)
        layer.plain_type = before
        layer.attach(layout.size, perturbation, respond)
        layers[path] = layer
    if not any(layer.responding for layer in layers.values()):
        raise ValueError(
            f"{type(module).__name__} has no layer that can respond; expected a trained "
            f"{', '.join(sorted({kind.__name__ for kind in KINDS}))}."
        )
    for path, name in (dropout or {}).items():
        _tune_dropout(path, _key("dropout", path, name, layout), found, perturbation)
    for path, name in (dropconnect or {}).items():
        key = _key("dropconnect", path, name, layout)
        if path not in layers:
            raise ValueError(f"dropconnect: {path!r} does not respond; "
                             f"{did_you_mean(path, layers)}")  # fmt: skip
        if key[0] in layout.domains and key[0] not in layout.per_batch:
            raise ValueError(
                f"dropconnect[{path!r}]: weights are shared by all examples, so {key[0]!r} needs "
                f"one perturbation per minibatch; add it to per_batch."
            )
        layers[path].dropconnect = key
    return Converted(clone, perturbation, layers, _ties(layers))


def _check_supported(module: nn.Module) -> None:
    for path, layer in module.named_modules():
        where = path or type(module).__name__
        if isinstance(layer, LazyModuleMixin):
            raise ValueError(f"{where} is a lazy module; run the network once before.")
        if parametrize.is_parametrized(layer):
            raise ValueError(
                f"{where} has parametrized weights, which cannot respond; remove them with "
                "torch.nn.utils.parametrize.remove_parametrizations."
            )


def _recurrent(kind: type[Response]) -> bool:
    return issubclass(kind, _Recurrent)


def _options(layer: nn.Module) -> dict[str, str]:
    """Return options of a layer that response layers do not have, and what they must be."""
    wrong: dict[str, Any] = {}
    if isinstance(layer, nn.LSTM | nn.GRU):
        wrong = {"batch_first": False, "bidirectional": True, "proj_size": ...}
    elif isinstance(layer, nn.MultiheadAttention):
        wrong = {"batch_first": False, "_qkv_same_embed_dim": False, "add_zero_attn": True}
    elif isinstance(layer, nn.Embedding):
        wrong = {"max_norm": ..., "scale_grad_by_freq": True, "sparse": True}
    found = {}
    for option, bad in wrong.items():
        value = getattr(layer, option)
        if bool(value) if bad is ... else value is bad:
            expected = "" if bad is ... else f"; it must be {not bad}"
            found[option] = f"{option.lstrip('_')}={value} cannot respond{expected}"
    if isinstance(layer, nn.MultiheadAttention) and layer.bias_k is not None:
        found["bias_k"] = "add_bias_kv cannot respond"
    return found


def _check_layer(path: str, layer: nn.Module) -> None:
    """Refuse options that the response layers do not have."""
    for found in _options(layer).values():
        raise ValueError(f"{path}: a {type(layer).__name__} with {found}; list it in plain=.")


def _key(
    what: str, path: str, name: str | tuple[str, int], layout: Layout
) -> tuple[str, int | None]:
    """Return (name, index) of a rate, checked."""
    key, index = (name, None) if isinstance(name, str) else name
    if key not in layout.domains:
        raise ValueError(
            f"{what}[{path!r}]: {key!r} is not owned by the gradient; "
            f"{did_you_mean(key, layout.domains)}"
        )
    domain = layout.domains[key]
    if index is None and domain.shape:
        raise ValueError(
            f"{what}[{path!r}]: {key!r} has shape {domain.shape}; give an element, ({key!r}, 0)."
        )
    if domain.high is None or domain.high >= 1 or domain.low is None or domain.low < 0:
        raise ValueError(
            f"{what}[{path!r}]: the rate {key!r} must have bounds 0 <= low and high < 1, because "
            f"what is kept is divided by 1 - rate, but got low={domain.low} and high={domain.high}."
        )
    return key, index


def _tune_dropout(
    path: str, key: tuple[str, int | None], found: Mapping[str, nn.Module], shared: Perturbation
) -> None:
    layer = found.get(path)
    if isinstance(layer, _Recurrent):
        layer.between = key
        return
    if layer is None or type(layer) not in SHARED:
        known = [p for p, m in found.items() if type(m) in SHARED or isinstance(m, _Recurrent)]
        raise ValueError(f"dropout: {path!r} is no dropout layer; {did_you_mean(path, known)}")
    dims, kind = SHARED[type(layer)], type(layer)
    layer.__class__ = TunedDropout
    assert isinstance(layer, TunedDropout)
    layer.attach(shared, key, dims, kind)


def _ties(layers: Mapping[str, Response]) -> tuple[tuple[str, ...], ...]:
    """Return the paths of layers that share a responding parameter."""
    users: dict[int, list[str]] = {}
    for path, layer in layers.items():
        for name in layer.responding:
            users.setdefault(id(layer._parameters[name]), []).append(path)
    return tuple(tuple(paths) for paths in users.values() if len(paths) > 1)
