"""The table of KV-cache policies, and how a spec such as ``kivi:bits=2,group=32`` becomes one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from quantkit.algorithms.kv.akvq_vl import AkvqSettings, akvq_vl
from quantkit.algorithms.kv.kivi import KiviSettings, kivi
from quantkit.algorithms.kv.plain import PlainSettings, plain
from quantkit.algorithms.kv.policy import FLOAT_BITS, KvPolicy
from quantkit.algorithms.kv.zipcache import ZipCacheSettings, zipcache
from quantkit.errors import RequestError, did_you_mean
from quantkit.formats.kv_page import PAGE, WIDTHS

_BITS = (*WIDTHS, FLOAT_BITS)
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")


@dataclass(frozen=True, slots=True, kw_only=True)
class NoSettings:
    """A policy without settings."""


@dataclass(frozen=True, slots=True)
class KvMethod:
    """One line of the table."""

    settings: type[Any]
    build: Callable[..., KvPolicy]
    paper: str
    summary: str
    defaults: tuple[tuple[str, Any], ...] = ()


def _fp16(settings: NoSettings, name: str) -> KvPolicy:
    return KvPolicy(name=name, bits=())


KV_METHODS: dict[str, KvMethod] = {
    "akvq-vl": KvMethod(
        AkvqSettings,
        akvq_vl,
        "arXiv:2501.15021",
        "2 bits, rotated; pivot tokens, and text in early layers, kept better",
    ),
    "zipcache": KvMethod(
        ZipCacheSettings,
        zipcache,
        "arXiv:2405.14256",
        "salient tokens at 4 bits, the others at 2, by normalized attention",
    ),
    "kivi": KvMethod(KiviSettings, kivi, "arXiv:2402.02750", "keys per channel, values per token, in groups of 32"),
    "int2": KvMethod(PlainSettings, plain, "-", "2 bits, a range for each token and head", (("bits", 2),)),
    "int4": KvMethod(PlainSettings, plain, "-", "4 bits, a range for each token and head", (("bits", 4),)),
    "int8": KvMethod(PlainSettings, plain, "-", "8 bits, a range for each token and head", (("bits", 8),)),
    "fp16": KvMethod(NoSettings, _fp16, "-", "16 bits: nothing is quantized"),
}


@dataclass(frozen=True, slots=True)
class KvSpec:
    """A parsed spec: ``layer_policy(index, sees_images)`` is what layer `index` does."""

    text: str
    method: str
    settings: Any

    def layer_policy(self, index: int, sees_images: bool = False) -> KvPolicy:
        """The policy of one layer."""
        build = KV_METHODS[self.method].build
        if self.method == "akvq-vl":
            build = partial(build, text_salient=sees_images and index < self.settings.text_layers)
        return build(self.settings, self.method)


def parse_kv_spec(text: str) -> KvSpec:
    """A policy's name, then settings: ``akvq-vl``, ``kivi:bits=2,group=32``.

    Raises:
        RequestError: an unknown name, setting or value.

    >>> parse_kv_spec("kivi:bits=4").settings
    KiviSettings(bits=4, group=32, rotate=False, window=128)
    """
    name, _, rest = text.strip().partition(":")
    method = KV_METHODS.get(name)
    if method is None:
        raise RequestError(f"unknown KV policy {name!r}; {did_you_mean(name, KV_METHODS)}")
    known = {field.name: field for field in fields(method.settings)}
    values = dict(method.defaults)
    for item in filter(None, (item.strip() for item in rest.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise RequestError(f"KV policy {name}: {item!r} is not a setting; write {name}:setting=value,...")
        if key not in known:
            hint = did_you_mean(key, known) if known else "it has none"
            raise RequestError(f"KV policy {name}: no setting {key!r}; {hint}")
        values[key] = _parse(name, key, value, str(known[key].type))
    spec = KvSpec(text.strip(), name, method.settings(**values))
    for sees_images in (False, True):
        _check(spec.layer_policy(0, sees_images))
    return spec


def _parse(policy: str, key: str, value: str, kind: str) -> Any:
    if kind == "bool":
        if value.lower() in _TRUE + _FALSE:
            return value.lower() in _TRUE
        raise RequestError(f"KV policy {policy}: {key} is true or false, not {value!r}")
    if kind.startswith("Literal"):
        known = re.findall(r"'(\w+)'", kind)
        if value in known:
            return value
        raise RequestError(f"KV policy {policy}: {key} is {' or '.join(known)}, not {value!r}")
    try:
        return int(value) if kind == "int" else float(value)
    except ValueError:
        wanted = "a whole number" if kind == "int" else "a number"
        raise RequestError(f"KV policy {policy}: {key} is {wanted}, not {value!r}") from None


def _check(policy: KvPolicy) -> None:
    """What can be known before a model is: widths, group sizes, counts."""

    def refuse(what: str) -> RequestError:
        return RequestError(f"KV policy {policy.name}: {what}")

    for bits in policy.bits:
        if bits not in _BITS:
            raise refuse(f"bits are 2, 4, 8 or 16 (not quantized), not {bits}")
    for grid in (policy.keys, policy.values):
        if grid.axis == "channel" and (grid.group < 1 or PAGE % grid.group):
            raise refuse(f"a group of keys is 1, 2, 4, ... or 128 tokens, not {grid.group}")
        if grid.group < 0:
            raise refuse(f"group is a number of channels (0: the head), not {grid.group}")
    if not all(0 < clip <= 1 for clip in policy.clip):
        raise refuse(f"clip is above 0 and at most 1, not {min(policy.clip)}")
    if not 0 <= policy.share <= 1:
        raise refuse(f"share is from 0 to 1, not {policy.share}")
    if policy.window < 1 or policy.pinned < 0:
        raise refuse(f"window is at least 1 and pivots at least 0, not {policy.window} and {policy.pinned}")


def check_head(policy: KvPolicy, head_dim: int) -> None:
    """Refuse groups that do not divide the heads of a model."""
    for grid in (policy.keys, policy.values):
        grid = grid.for_head(head_dim)
        if grid.axis == "token" and head_dim % grid.group:
            raise RequestError(
                f"KV policy {policy.name}: group {grid.group} does not divide the head dimension {head_dim}; "
                f"use a divisor of {head_dim}, or 0 for the whole head"
            )
