"""Manifests against the published types of Kubernetes' and Kubeflow's APIs, as their own Python clients carry them."""

from __future__ import annotations

from typing import Any

import kubernetes.client
from kubeflow.training import models

PLAIN: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "bool": bool, "float": (int, float)}
KINDS = {
    "ConfigMap": "V1ConfigMap",
    "Service": "V1Service",
    "Job": "V1Job",
    "PyTorchJob": "KubeflowOrgV1PyTorchJob",
}


def check(document: dict[str, Any]) -> None:
    """Raises ValueError where a field is unknown, of another type, missing, or has a value that is not allowed."""
    _made(document, KINDS[document["kind"]], document["kind"])


def _made(value: Any, kind: str, path: str) -> Any:
    """`value` as the client's own object, which refuses what lacks and what is not allowed."""
    if kind.startswith("list["):
        _expect(value, list, path)
        return [_made(each, kind[5:-1], f"{path}[{number}]") for number, each in enumerate(value)]
    if kind.startswith("dict("):
        _expect(value, dict, path)
        if path.endswith((".limits", ".requests")):  # quantities, which may be numbers too
            value = {key: str(each) if isinstance(each, int) else each for key, each in value.items()}
        return {key: _made(each, kind[len("dict(str, ") : -1], f"{path}.{key}") for key, each in value.items()}
    if kind in PLAIN:
        _expect(value, PLAIN[kind], path)
        return value
    if kind == "object":  # a number or a text
        return value
    _expect(value, dict, path)
    model = getattr(models, kind, None) or getattr(kubernetes.client, kind)
    names = {there: here for here, there in model.attribute_map.items()}
    if unknown := value.keys() - names.keys():
        raise ValueError(f"{path}: no such field: {', '.join(sorted(unknown))}")
    given = {names[key]: _made(each, model.openapi_types[names[key]], f"{path}.{key}") for key, each in value.items()}
    try:
        return model(**given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _expect(value: Any, kind: Any, path: str) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{path}: {value!r} is a {type(value).__name__}, not {kind}")
