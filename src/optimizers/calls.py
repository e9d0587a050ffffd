"""Calls of optimizers and schedules as text: the names there are, and a parser that runs nothing.

The text is the call that PyTorch's users know, without the parameters or the optimizer as first
argument: `SGD(momentum=0.9, nesterov=True)`, `MultiStepLR(milestones=[10, 15])`. Names are those of
`torch.optim` and `torch.optim.lr_scheduler` and those of `oneflow_optim`. A function is an
arithmetic expression, as a string or a lambda: `LambdaLR('0.95 ** epoch')`.

A text may come from a stranger, in a checkpoint. It never runs code: only names from the tables
below, plain values and arithmetic are read, all else is refused. Its length, its nesting and its
numbers are bounded, so that reading it costs at most a few seconds and a few megabytes. What the
call it makes may cost is bounded where it is built: the memory of LBFGS by `optim.MAX_HISTORY`, the
rehearsal of a schedule by `schedule.MAX_REHEARSAL`.
"""

import ast
import difflib
import inspect
import itertools
import math
import operator
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim.lr_scheduler import LRScheduler

from common.errors import UserError
from optimizers import oneflow_optim

Classes = dict[str, list[type]]  # a name and the classes that bear it, PyTorch's first


def _subclasses(base: type, *modules: Any) -> Classes:
    classes: Classes = {}
    for module in modules:
        for name, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, base) and cls is not base and not name.startswith("_"):
                classes.setdefault(name, []).append(cls)
    return dict(sorted(classes.items(), key=lambda item: item[0].lower()))


OPTIMIZERS = _subclasses(Optimizer, torch.optim, oneflow_optim)
SCHEDULERS = _subclasses(LRScheduler, lr_scheduler, swa_utils, oneflow_optim)
SHORT_NAMES = {
    "cosine": "CosineAnnealingLR",
    "plateau": "ReduceLROnPlateau",
    "restarts": "CosineAnnealingWarmRestarts",
    "chained": "ChainedScheduler",
}  # and every name without its LR: onecycle, cyclic, step, linear, ...

A_CALL = "a call such as SGD(momentum=0.9) or StepLR(step_size=5)"
MAX_TEXT = 4000  # characters; no setting of a training run is longer, deeper or larger
MAX_DEPTH = 20  # of brackets
MAX_LEVELS = 100  # of the syntax tree, in which a sum has one for each term
MAX_NUMBER = 1e100

# Arguments that the training script sets, or has no use for.
HIDDEN = {"self", "params", "optimizer", "last_epoch", "differentiable", "capturable"}
CLIPPING = [  # OneFlow's options of a parameter group, which every optimizer but LBFGS takes
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
    for name, kind in (
        ("clip_grad_max_norm", "float | list[float] | None"),
        ("clip_grad_norm_type", "float | str | None"),
    )
]

VARIABLES = ("epoch", "step", "x")  # what an expression may call its argument
CONSTANTS = {"pi": math.pi, "e": math.e}
FUNCTIONS = {name: getattr(math, name) for name in ("exp", "log", "sqrt", "sin", "cos", "tanh")}
FUNCTIONS |= {"floor": math.floor, "ceil": math.ceil, "abs": abs, "min": min, "max": max}


def _power(base: float, exponent: float) -> float:
    small = isinstance(base, int) and isinstance(exponent, int) and exponent >= 0
    if small and base.bit_length() * exponent <= 64:
        return base**exponent
    try:
        return float(base) ** exponent
    except OverflowError:  # at once, where an int would grow for ever
        return math.inf


OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Pow: _power,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.USub: operator.neg, ast.UAdd: operator.pos,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip


def _evaluate(node: ast.expr, names: Mapping[str, float] = CONSTANTS) -> float:
    """The value of an arithmetic expression with these `names`. Raises UserError if it is anything
    else, or its value is not a finite real number.
    """

    def value(node: ast.expr) -> float:
        return _evaluate(node, names)

    match node:
        case ast.Constant(value=int() | float() as result):
            pass
        case ast.Name(id=name) if name in names:
            result = names[name]
        case (
            ast.BinOp(left=left, op=op, right=right)
            | ast.Compare(left=left, ops=[op], comparators=[right])
        ) if type(op) in OPERATORS:
            result = OPERATORS[type(op)](value(left), value(right))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            result = OPERATORS[type(op)](value(operand))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            result = value(body) if value(test) else value(orelse)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            result = FUNCTIONS[name](*map(value, args))
        case _:
            raise UserError(
                f"{_short(ast.unparse(node))} is not a value; known are numbers, arithmetic, "
                f"{', '.join([*names, *FUNCTIONS])}"
            )
    if isinstance(result, complex) or not abs(result) < MAX_NUMBER:
        raise UserError(f"{_short(ast.unparse(node))} is not a finite real number")
    return result


class Expression:
    """A function of the epoch: '0.95 ** epoch' or 'lambda epoch: 0.95 ** epoch'."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tree = _parse(text)
        if isinstance(self.tree, ast.Lambda):
            self.tree = self.tree.body

    def __call__(self, argument: float) -> float:
        try:
            return _evaluate(self.tree, CONSTANTS | dict.fromkeys(VARIABLES, argument))
        except (ArithmeticError, RecursionError, TypeError, ValueError) as error:
            raise UserError(f"{self!r} at {argument}: {error}") from None

    def __repr__(self) -> str:
        return repr(self.text)


@dataclass
class Call:
    """A class and its arguments; as text it is the call that makes the same again."""

    cls: type
    arguments: dict[str, Any]

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.cls.__name__}({inside})"

    def all_calls(self) -> "Iterator[Call]":
        """This call and those inside it."""
        yield self
        for inner in self.arguments.get("schedulers", ()):
            yield from inner.all_calls()


@contextmanager
def naming(call: Call) -> Iterator[None]:
    """Turn whatever PyTorch raises on a call's arguments into a `UserError` that names the call."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{call}: {error or type(error).__name__}") from error


def _parse(text: str) -> ast.expr:
    """The syntax tree of one expression, of bounded size."""
    if len(text) > MAX_TEXT:
        raise UserError(f"{len(text):,} characters given, expected at most {MAX_TEXT:,}")
    depths = itertools.accumulate((c in "([{") - (c in ")]}") for c in text)
    if max(depths, default=0) > MAX_DEPTH:
        raise UserError(f"{_short(text)!r} is nested deeper than {MAX_DEPTH} brackets")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(f"{_short(text)!r} is not {A_CALL}") from None
    level = [tree]
    for _ in range(MAX_LEVELS):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    if level:
        raise UserError(f"{_short(text)!r} is nested deeper than {MAX_LEVELS} levels")
    return tree


def parse_call(text: str, classes: Classes) -> Call:
    """`Name` or `Name(argument, name=value, ...)` as a `Call` of one of the `classes`.

    Upper and lower case are the same, a name may go without its LR, and SHORT_NAMES are understood.
    Of two classes with the same name, the first that has all the arguments is taken. Raises
    UserError if the text is not such a call, its name is not known (the message begins with the
    nearest ones), or an argument is not in the signature or of another type.
    """
    try:
        return _read_call(_parse(text), classes)
    except (ArithmeticError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{_short(text)!r}: {error}") from None


def _read_call(node: ast.expr, classes: Classes) -> Call:
    match node:
        case ast.Name(id=name):
            args, keywords = [], []
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            pass
        case _:
            raise UserError(f"{_short(ast.unparse(node))!r} is not {A_CALL}")
    candidates = _find(name, classes)
    values = [_read_value(arg, classes) for arg in args]
    named = {keyword.arg: _read_value(keyword.value, classes) for keyword in keywords}
    if len(named) < len(keywords):
        raise UserError(f"{_short(ast.unparse(node))} gives an argument twice")
    for cls in candidates:
        signature = signature_of(cls)
        try:
            arguments = signature.bind_partial(*values, **named).arguments
        except TypeError as error:
            problem = error
            continue
        for key, value in arguments.items():
            arguments[key] = _validated(value, signature.parameters[key], cls)
        return Call(cls, dict(arguments))
    signatures = " or ".join(map(describe_signature, candidates))
    raise UserError(f"{_short(ast.unparse(node))}: {problem}; expected {signatures}")


def _find(name: str, classes: Classes) -> list[type]:
    if name.lower() in SHORT_NAMES:
        name = SHORT_NAMES[name.lower()]
    for known, candidates in classes.items():
        if name.lower() in (known.lower(), known.lower().removesuffix("lr")):
            return candidates
    spelled = {known.lower(): known for known in classes}
    nearest = difflib.get_close_matches(name.lower()[:60], spelled, n=len(spelled), cutoff=0)
    names = ", ".join(spelled[known] for known in nearest)
    raise UserError(f"{_short(name)!r} is not known; expected one of {names}")


def _read_value(node: ast.expr, classes: Classes) -> Any:
    match node:
        case ast.Constant(value=None | bool() | str() as value):
            return value
        case ast.List(elts=elements):
            return [_read_element(element, classes) for element in elements]
        case ast.Tuple(elts=elements):
            return tuple(_read_element(element, classes) for element in elements)
        case ast.Lambda(args=ast.arguments(args=[ast.arg(arg=name)])) if name in VARIABLES:
            return ast.unparse(node)
        case ast.Call(func=ast.Name(id=name)) if name not in FUNCTIONS:
            return _read_call(node, classes)
        case _:
            return _evaluate(node)


def _read_element(node: ast.expr, classes: Classes) -> Any:
    """A value in a list, where a bare name is a schedule: [linear, cosine]."""
    if isinstance(node, ast.Name) and node.id not in CONSTANTS:
        return _read_call(node, classes)
    return _read_value(node, classes)


def signature_of(cls: type) -> inspect.Signature:
    """The arguments that a text may give to `cls`."""
    shown = [p for p in inspect.signature(cls).parameters.values() if p.name not in HIDDEN]
    return inspect.Signature(shown + (CLIPPING if issubclass(cls, Optimizer) else []))


def describe_signature(cls: type, filled: Collection[str] = ()) -> str:
    """`Name(argument=default, ...)`, with `=<run>` after the arguments that are `filled`."""
    shown = []
    for name, parameter in signature_of(cls).parameters.items():
        if name in filled:
            shown.append(f"{name}=<run>")
        elif parameter not in CLIPPING:
            default = parameter.default
            shown.append(name if default is parameter.empty else f"{name}={default!r}")
    return f"{cls.__name__}({', '.join(shown)})"


def _validated(value: Any, parameter: inspect.Parameter, cls: type) -> Any:
    """`value` as the parameter takes it: an `Expression` where a function is expected.

    PyTorch's classes check few types: a milestone 'a' would silently never be reached. Raises
    UserError if the value is of another type.
    """
    kind = parameter.annotation
    if kind is parameter.empty:
        kind = type(parameter.default)
    kind = kind if isinstance(kind, str) else inspect.formatannotation(kind)
    kind = re.sub(r"^(?:typing\.)?(?:Union|Optional)\[(.*)\]$", r"\1", kind)
    if kind == "float" and issubclass(cls, LRScheduler):
        kind = "float | list[float]"  # one for each parameter group
    if "Callable" in kind and isinstance(value, str):
        return Expression(value)
    if "Callable" in kind and isinstance(value, list):
        return [_validated(each, parameter, cls) for each in value]
    if not _fits(value, kind, parameter.default):
        kind += " of at least 0" if type(value) is int and kind.startswith("int") else ""
        raise UserError(
            f"{cls.__name__}: {parameter.name}={_short(repr(value))} given, expected {kind}; "
            f"{describe_signature(cls)}"
        )
    return value


def _fits(value: Any, kind: str, default: Any) -> bool:
    """Whether `value` may replace `default` where the annotation is `kind`."""
    sequences = {"list", "tuple", "Iterable", "Sequence"}
    words = set(re.findall(r"\w+", re.sub(r"\[.*\]", "", kind)))
    match value:
        case None:
            return default is None or "None" in words
        case bool():
            return "bool" in words
        case str():
            return not words.isdisjoint({"str", "Literal"})
        case int() if "float" not in words:
            return "int" in words and value >= 0  # whole numbers count something
        case int() | float():
            return "float" in words
        case Call():
            return "LRScheduler" in words
        case tuple() if isinstance(default, tuple) and len(value) != len(default):
            return False
        case list() | tuple():
            inside = " ".join(set(re.findall(r"\w+", kind)) - sequences)
            return not words.isdisjoint(sequences) and all(
                _fits(each, inside, default) for each in value
            )
    return False


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
