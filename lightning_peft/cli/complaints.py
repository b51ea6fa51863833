"""``paragraph`` turns what jsonargparse says of a command line or a configuration into one paragraph."""

from __future__ import annotations

import difflib
import inspect
import pydoc
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..core.method import Method, methods_by_name

_UNKNOWN = re.compile(r"unrecognized arguments: (\S+)")
_KEY = re.compile(r"(?:Subcommand|Group) '[\w-]+' does not accept (?:option|nested key) '([^']+)'")
_NOT_ACCEPTED = re.compile(r"given class_path '([^']+)':\s+Option '([^']+)' is not accepted")
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_OF_CLASS = re.compile(r"given class_path '([^']+)':\s+(.*?)(?=\n +- |\n +Given value|\Z)", re.DOTALL)
_PLACE = re.compile(r'Parser key "([^"]+)":\s*(.*)', re.DOTALL)
_NO_COMMAND = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)", re.DOTALL)
_REQUIRED = re.compile(r"arguments are required: (.*)")
_SUBTYPES = re.compile(r"<class '([\w.]+)'>")
_EXPECTED = re.compile(r"Expected an? (.*?)(?:\. Got value: |\n|$)")
_VALUE = re.compile(r"(?:Got value: |Given value: )(.*)")


def paragraph(message: str, parser: Any) -> str:
    """Return a message of jsonargparse as one paragraph, with the nearest names where one is not known.

    Args:
        message: What jsonargparse says.
        parser: The parser that says it.
    """
    answers: tuple[tuple[re.Pattern[str], Callable[[re.Match[str], Any], str]], ...] = (
        (_UNKNOWN, _unknown_option),
        (_KEY, _unknown_key),
        (_NO_COMMAND, _unknown_command),
        (_REQUIRED, _missing),
        (_PLACE, _wrong_value),
    )
    found = ((match, answer) for pattern, answer in answers if (match := pattern.search(message)))
    match, answer = next(found, (None, None))
    text = message if match is None or answer is None else answer(match, parser)
    return " ".join(text.split())


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a sentence that lists the names nearest to one, which may be the end of a longer one; or nothing."""
    names = list(dict.fromkeys(names))
    leaf, lower = name.rpartition(".")[2].lstrip("-"), {other.lower(): other for other in names}
    ends = [other for other in names if other.rpartition(".")[2].lstrip("-") == leaf]
    begins = [other for other in names if len(leaf) > 2 and other.startswith(name)]
    close = [
        lower[other]
        for other in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.7 if len(name) > 4 else 0.6)
    ]
    found = list(dict.fromkeys([*begins[:3], *ends, *close]))[:3]
    return f" Nearest: {', '.join(found)}." if found else ""


def _unknown_option(match: re.Match[str], parser: Any) -> str:
    given = match[1].partition("=")[0]
    if not given.startswith("-"):
        return f"{given!r} belongs to no option. Options begin with --."
    return f"There is no option {given}.{nearest(given, [f'--{key}' for key in _keys(parser)])}"


def _unknown_key(match: re.Match[str], parser: Any) -> str:
    key, keys = match[1], list(_keys(parser))
    first = key.partition(".")[0]
    sections = {other.partition(".")[0] for other in keys}
    if first not in sections:
        return f"The configuration has a section {first!r}, which does not exist.{nearest(first, sections)}"
    return f"The configuration has the key {key!r}, which does not exist.{nearest(key, keys)}"


def _unknown_command(match: re.Match[str], parser: Any) -> str:
    names = re.findall(r"[\w-]+", match[2])
    return f"There is no command {match[1]!r}.{nearest(match[1], names)} Choose from {', '.join(names)}."


def _missing(match: re.Match[str], parser: Any) -> str:
    command = match[1].partition(".")[0] if "." in match[1] else ""
    positional = {action.dest for action in parser._actions if not action.option_strings}
    given = [name.strip().removeprefix(f"{command}.") for name in match[1].split(",")]
    names = ", ".join(name.upper() if name in positional else f"--{name}" for name in given)
    return f"{command or 'This command'} needs {names}{_from_file(given, positional)}."


def _from_file(names: list[str], positional: set[str]) -> str:
    return "" if positional.issuperset(names) else ": give the option, or a --config FILE that has it"


def _wrong_value(match: re.Match[str], parser: Any) -> str:
    key, said = match[1], match[2]
    if setting := _NOT_ACCEPTED.search(said):
        return f"{key}: {_short(setting[1])} has no setting {setting[2]!r}.{_settings(setting[1], setting[2])}"
    if (name := _NO_CLASS.search(said)) and "{" not in name[1]:
        return f"{key}: there is no class {name[1]!r}.{_classes(name[1], said)}"
    if inner := _OF_CLASS.search(said):
        place = _PLACE.match(inner[2])
        if place is not None:
            return _wrong_value(re.match(_PLACE, f'Parser key "{key}.{place[1]}": {place[2]}') or match, parser)
        return f"{key}: {inner[1]}: {inner[2]}{_where(inner[2])}"
    expected = [_type(kind) for kind in _EXPECTED.findall(said)]
    value = _VALUE.findall(said)
    if expected and value:
        return f"{key}: expected {' or '.join(dict.fromkeys(expected))}, got {value[-1].strip()!r}."
    return f"{key}: {said}"


def _where(said: str) -> str:
    return ". Modules are looked for among installed packages and in the working directory." * ("No module" in said)


def _settings(path: str, given: str) -> str:
    """Return a sentence with the settings of a class, the nearest first."""
    try:
        cls = pydoc.locate(path)
        names = [name for name in inspect.signature(cls).parameters if name not in ("args", "kwargs")]  # type: ignore[arg-type]
    except (TypeError, ValueError, pydoc.ErrorDuringImport):
        return ""
    return f"{nearest(given, names)} Fields of {_short(path)}: {', '.join(names)}."


def _classes(given: str, said: str) -> str:
    """Return a sentence with the classes that a setting takes, the nearest first."""
    bases = [found for path in _SUBTYPES.findall(said) if isinstance(found := pydoc.locate(path), type)]
    names = dict.fromkeys(
        cls.__name__ for base in bases for cls in _subclasses(base) if not cls.__name__.startswith("_")
    )
    listed = f" Methods: {', '.join(methods_by_name())}." if Method in bases else ""
    return f"{nearest(given, names)}{listed} A class of your own goes by its path, such as my_module.MyClass."


def _subclasses(cls: type) -> Iterator[type]:
    children: list[type] = type.__subclasses__(cls)
    for subclass in children:
        yield subclass
        yield from _subclasses(subclass)


def _keys(parser: Any) -> Iterator[str]:
    """Yield the keys of a parser, and those of the classes that its sections take."""
    for action in parser._actions:
        yield from (option[2:] for option in action.option_strings if option.startswith("--"))
    if any(action.dest == "peft.method" for action in parser._actions):
        for cls in methods_by_name().values():
            yield from (f"peft.method.{name}" for name in inspect.signature(cls).parameters)
        from .. import tasks

        for name in tasks.__all__:
            section = "data" if name.endswith("DataModule") else "model"
            yield from (f"{section}.{setting}" for setting in inspect.signature(getattr(tasks, name)).parameters)


def _short(path: str) -> str:
    return path.rpartition(".")[2]


def _type(kind: str) -> str:
    if literal := re.match(r"typing\.Literal\[(.*)\]", kind):
        return literal[1].replace(", ", " or ")
    name = kind.removeprefix("<class '").removesuffix("'>")
    return {"NoneType": "null", "int": "a whole number (int)", "float": "a number (float)"}.get(name, _short(name))
