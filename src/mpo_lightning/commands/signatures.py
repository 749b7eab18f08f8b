"""Settings as the source of functions and classes has them; nothing is imported for it.

A page of help needs names, defaults and purposes. To import what they belong to takes seconds, most
of them in torch and Lightning; to read where it is written takes a fraction of one.
"""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from docstring_parser import parse as parse_docstring

__all__ = [
    "Definition",
    "Setting",
    "definition",
    "purposes_of",
    "settings_of",
    "source",
    "subclasses",
]

DATACLASS = "dataclass"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What may be set.

    Args:
        name: its name, with a dot between levels.
        default: as it is written in the source; none if the setting has to be given.
        purpose: what it is for, as the docstring has it.
        kind: its type, as it is written in the source.
        choices: the values that there are, if its type names them.
    """

    name: str
    default: str | None
    purpose: str
    kind: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Definition:
    """Something that a module defines: its syntax tree, and the module's name."""

    node: ast.stmt
    module: str


@functools.cache
def source(module: str) -> ast.Module:
    """The syntax tree of a module that is installed, or of a package's ``__init__``."""
    package, *rest = module.split(".")
    found = find_spec(package)
    # Only the outermost package is looked up: the others would be imported for it.
    assert found is not None
    assert found.submodule_search_locations is not None
    path = Path(found.submodule_search_locations[0], *rest)
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def definition(module: str, name: str) -> Definition | None:
    """What a name stands for in a module, followed through imports; none if it is a builtin."""
    for node in source(module).body:
        match node:
            case ast.ClassDef() | ast.FunctionDef() if node.name == name:
                return Definition(node, module)
            case ast.Assign(targets=[ast.Name(id=target)]) if target == name:
                return Definition(node, module)
            case ast.ImportFrom(module=str(origin), names=aliases, level=0):
                for alias in aliases:
                    # Of the standard library nothing is of interest, nor of torch, whose files are
                    # many.
                    followed = origin.split(".")[0] in {"mpo_lightning", "lightning"}
                    if (alias.asname or alias.name) == name and followed:
                        return definition(origin, alias.name)
            case _:
                pass
    return None


def _bases(found: Definition) -> Iterator[Definition]:
    """A class and those that it inherits from, the nearest first."""
    yield found
    for base in _bases_of(found):
        if isinstance(base, ast.Name) and (above := definition(found.module, base.id)):
            yield from _bases(above)


def _bases_of(found: Definition) -> list[ast.expr]:
    return found.node.bases if isinstance(found.node, ast.ClassDef) else []


def _is_dataclass(found: Definition) -> bool:
    return isinstance(found.node, ast.ClassDef) and any(
        DATACLASS in ast.unparse(each) for each in found.node.decorator_list
    )


def _named(annotation: ast.expr, module: str) -> Definition | None:
    return definition(module, annotation.id) if isinstance(annotation, ast.Name) else None


def _literals(annotation: ast.expr, module: str) -> tuple[str, ...]:
    """The values of a ``Literal``, also of one that has a name, and of a bool."""
    match annotation:
        case ast.Subscript(value=ast.Name(id="Literal"), slice=values):
            elements = values.elts if isinstance(values, ast.Tuple) else [values]
            return tuple(str(ast.literal_eval(each)) for each in elements)
        case ast.Name(id="bool"):
            return ("true", "false")
        case ast.Name(id=name):
            found = definition(module, name)
            if found is not None and isinstance(found.node, ast.Assign):
                return _literals(found.node.value, found.module)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _literals(left, module) + _literals(right, module)
        case ast.Subscript(value=ast.Name(id="Optional" | "Union"), slice=inner):
            kinds = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return tuple(dict.fromkeys(v for kind in kinds for v in _literals(kind, module)))
        case _:
            pass
    return ()


def _written(default: ast.expr | None) -> str | None:
    """A default as one would give it: a factory's lambda shows what it makes."""
    match default:
        case None:
            return None
        case ast.Constant(value=None):
            return "null"
        case ast.Constant(value=bool(value)):
            return str(value).lower()
        case ast.Constant():
            return str(default.value)
        case ast.Lambda(body=body):
            default = body
        case ast.Call(func=ast.Name(id="field"), keywords=[ast.keyword("default_factory", made)]):
            return {"dict": "{}", "list": "[]"}.get(ast.unparse(made)) or _written(made)
        # As YAML has it.
        case ast.Tuple(elts=elements):
            default = ast.List(elements)
    return ast.unparse(default)


def _parameters(node: ast.FunctionDef) -> Iterator[tuple[ast.arg, ast.expr | None]]:
    plain = node.args.posonlyargs + node.args.args
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(node.args.defaults))
    yield from zip(plain, [*defaults, *node.args.defaults], strict=True)
    yield from zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)


def _own(found: Definition) -> list[tuple[str, ast.expr, ast.expr | None]]:
    """Name, annotation and default of each parameter of a function, class or dataclass."""
    node = found.node
    if isinstance(node, ast.FunctionDef):
        return [(a.arg, a.annotation, d) for a, d in _parameters(node) if a.annotation]
    assert isinstance(node, ast.ClassDef)
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and each.name == "__init__":
            return _own(Definition(each, found.module))
    if _is_dataclass(found):
        return [
            (each.target.id, each.annotation, each.value)
            for each in node.body
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
        ]
    return []


def settings_of(found: Definition) -> list[Setting]:
    """The settings of a function or class, and of the dataclasses among them.

    Args:
        found: where it is defined. A class that has no ``__init__`` takes that of its base.
    """
    # The fields of a dataclass's bases come before its own; an __init__ stands for all.
    owners = [found]
    if isinstance(found.node, ast.ClassDef):
        owners = [each for each in _bases(found) if _own(each)]
        if not _is_dataclass(found):
            owners = owners[:1]
    settings: dict[str, Setting] = {}
    for owner in reversed(owners):
        purposes = purposes_of(owner)
        for name, annotation, default in _own(owner):
            inner = _named(annotation, owner.module)
            if inner is not None and _is_dataclass(inner) and not _bases_of(inner):
                within = (replace(s, name=f"{name}.{s.name}") for s in settings_of(inner))
                settings |= {each.name: each for each in within}
                continue
            settings[name] = Setting(
                name=name,
                default=_written(default),
                purpose=purposes.get(name, ""),
                kind=ast.unparse(annotation),
                choices=_literals(annotation, owner.module),
            )
    return list(settings.values())


def subclasses(module: str, base: str) -> dict[str, Definition]:
    """The classes of a package that are a base's, and not abstract, by their names.

    Args:
        module: the package, which lists them in ``__all__``.
        base: name of the base.
    """
    wanted = definition(module, base)
    found = {}
    for node in source(module).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=names):
                for name in ast.literal_eval(names):
                    each = definition(module, name)
                    if each is not None and isinstance(each.node, ast.ClassDef):
                        found[name] = each
            case _:
                pass
    return {
        name: each
        for name, each in found.items()
        if wanted in list(_bases(each)) and "@abstractmethod" not in ast.unparse(each.node)
    }


def purposes_of(found: Definition) -> dict[str, str]:
    """What each parameter of a function or class is for, as its docstring has it.

    Args:
        found: where it is defined.
    """
    assert isinstance(found.node, ast.ClassDef | ast.FunctionDef)
    texts = [ast.get_docstring(found.node)]
    texts += [
        ast.get_docstring(each)
        for each in found.node.body
        if isinstance(each, ast.FunctionDef) and each.name == "__init__"
    ]
    return {
        parameter.arg_name: " ".join((parameter.description or "").split())
        for text in texts
        for parameter in parse_docstring(text or "").params
    }
