"""``build_estimator`` builds a scikit-learn classifier from its class path."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from ...core.optional_imports import check_extra
from ...tasks.messages import close_names

_KEYS = {"class_path", "init_args"}


def build_estimator(settings: Mapping[str, Any] | None) -> Any:
    """Return an estimator that is not fitted; ``LogisticRegression(max_iter=1000)`` by default.

    Args:
        settings: ``class_path`` and ``init_args``, as in other parts of a configuration.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: There is no such class, or it has no such argument; names close ones.
        TypeError: The class has no ``fit`` and ``predict``.
    """
    if settings is None:
        settings = {"class_path": "sklearn.linear_model.LogisticRegression", "init_args": {"max_iter": 1000}}
    if "class_path" not in settings or set(settings) - _KEYS:
        raise ValueError(f"classifier has {sorted(settings)}, expected class_path and, if wanted, init_args.")
    cls, arguments = _class(settings["class_path"]), settings.get("init_args") or {}
    parameters = inspect.signature(cls).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in arguments:
        if name not in parameters and not open_ended:
            raise ValueError(
                f"classifier.init_args has {name!r}, no argument of {cls.__name__}. {close_names(name, parameters)}"
            )
    return cls(**arguments)


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    if module.partition(".")[0] == "sklearn":
        check_extra("sklearn", f"{path} needs scikit-learn", "features")
    try:
        room = importlib.import_module(module)
    except (ImportError, ValueError) as error:
        raise ValueError(f"classifier.class_path={path!r} cannot be imported: {error}.") from error
    cls = getattr(room, name, None)
    if cls is None:
        classes = [key for key, value in vars(room).items() if inspect.isclass(value)]
        raise ValueError(f"{module} has no class {name!r}. {close_names(name, classes)}")
    if not inspect.isclass(cls) or not (hasattr(cls, "fit") and hasattr(cls, "predict")):
        raise TypeError(f"{path} has no fit and predict; give a classifier such as sklearn.svm.LinearSVC.")
    return cls
