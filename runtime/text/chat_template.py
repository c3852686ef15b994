"""`ChatTemplate`: renders a conversation into the prompt's text, in a sandbox with limits.

Chat templates are untrusted Jinja programs. They run in Jinja's immutable sandbox, restricted to allow-lists of
methods, filters and functions, and on a budget: statements, loops, calls, operators and filters deduct their cost, and
no value is built before its size is known to be acceptable. `_Instrumenter` rewrites the syntax tree so that what Jinja
compiles to plain Python is accounted for too. Apart from that the text equals transformers'
`apply_chat_template(tokenize=False)`.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.tests import TESTS
from jinja2.utils import Cycler, Joiner, Namespace, pass_environment
from jinja2.visitor import NodeTransformer

from llm_edge.runtime.errors import TemplateError
from llm_edge.runtime.text.template_budget import FILTER_COSTS, ITEM, MAX_PIECES, Budget, LimitError, plain_data

MAX_SOURCE = 1 << 20  # characters of a template
MAX_NODES = 20_000  # nodes of its syntax tree
_NODE, _CALL = 200, 3000  # cost of evaluating a node and of a call, in nanoseconds

_BUDGET: ContextVar[Budget] = ContextVar("llm_edge_template_budget")  # of the current rendering


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Filters that read only the elements of their arguments, and those that read the arguments as a whole. `FILTER_COSTS`
# has the same names.
_LIGHT = _words(
    """attr count d default first items last length map reject rejectattr safe select
    selectattr"""
)
_HEAVY = _words(
    """abs batch capitalize center dictsort e escape float forceescape groupby indent int lower max min
    replace reverse round slice sort string title trim truncate unique upper urlencode"""
)
_LONG = _words(  # filters that accept long strings
    """capitalize center count d default e escape first forceescape format indent join last length lower
    replace reverse safe string tojson trim truncate upper"""
)
_LIGHT_TESTS = _words(
    """boolean callable defined escaped even false filter float integer iterable mapping none number odd
    sameas sequence string test true undefined"""
)
_STR_METHODS = _words(
    """capitalize casefold center count endswith find index isalnum isalpha isascii isdecimal isdigit
    isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition
    removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith
    strip swapcase title upper zfill"""
)
_METHODS: dict[type, frozenset[str]] = {
    str: _STR_METHODS,
    dict: _words("items keys values get copy"),
    list: _words("index count copy"),
    tuple: _words("index count grouper list"),  # the last two: of groupby's result
}
_REFUSED_NODES = (
    nodes.Block, nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport, nodes.EvalContextModifier
)  # fmt: skip


def _metered(name: str, function: Callable[..., Any], heavy: bool, test: bool = False) -> Callable[..., Any]:
    """A filter or test that deducts the cost of its arguments and its result."""
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or environment, before the value

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        budget.spend(_CALL)
        for arg in itertools.chain(args[skip:], kwargs.values()):
            if heavy:
                budget.read(arg)
            elif isinstance(arg, list | tuple | dict | range):
                budget.spend(4 * ITEM * len(arg))
            if not (test or name in _LONG) and isinstance(arg, str) and len(arg) > MAX_PIECES:
                raise LimitError(f"{name} of too long a string")
        if not test:
            budget.allow(name, args[skip], args[skip + 1 :], kwargs)
            value = args[skip]
            if isinstance(value, str | list | tuple | dict | range):
                budget.spend(FILTER_COSTS[name] * len(value))
            elif isinstance(value, Iterator):
                args = (*args[:skip], budget.each(value, FILTER_COSTS[name]), *args[skip + 1 :])
        result = function(*args, **kwargs)
        return budget.each(result) if isinstance(result, Iterator) else budget.made(result)

    return call


def _getter(environment: _Sandbox, attribute: str | int | None) -> Callable[[Any], Any]:
    return (lambda item: item) if attribute is None else make_attrgetter(environment, attribute)


@pass_environment
def _join(environment: _Sandbox, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    budget, get = _BUDGET.get(), _getter(environment, attribute)
    return budget.concat([budget.text(get(item)) for item in budget.each(value)], budget.text(d))


@pass_environment
def _sum(environment: _Sandbox, iterable: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    if isinstance(start, str):
        raise TypeError("sum() can't sum strings")
    for item in map(_getter(environment, attribute), iterable):
        start = environment.call_binop(None, "+", start, item)
    return start


class _Format(SandboxedFormatter):
    """A string's `format` or `format_map` method, on the budget."""

    def __init__(self, environment: _Sandbox, pattern: str, *, is_map: bool) -> None:
        super().__init__(environment)
        self._pattern, self._is_map = pattern, is_map

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        if self._is_map:
            (kwargs,), args = args, ()
        return self.vformat(self._pattern, args, kwargs)

    def format_field(self, value: Any, format_spec: str) -> str:
        _BUDGET.get().spend(_CALL)
        return _BUDGET.get().format_field(value, format_spec)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        return _BUDGET.get().made(super().convert_field(_BUDGET.get().read(value), conversion))


class _Namespace(Namespace):
    """`namespace()` with a constant repr: its content may be recursive."""

    def __repr__(self) -> str:
        return "<Namespace>"


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:  # noqa: A002 (a name that templates may pass)
    if len(format) > 200:
        raise LimitError("too long a date")
    return datetime.now().strftime(format)


class _Generation(Extension):
    """`{% generation %}` marks the model's text for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        """Turn the block into a call of `body`, so that it has the same scope as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

    def body(self, caller: Callable[[], str]) -> str:
        """The text of the block."""
        return caller()


def _hook(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, f"<{name}>", [], [], None, None, lineno=node.lineno)  # no template can spell <name>


def _hooked(name: str, value: Any) -> Any:
    return getattr(_BUDGET.get(), name)(value)


def _reaches(count: int, items: Iterable[object]) -> bool:
    return sum(1 for _ in itertools.islice(items, count)) == count


class _Instrumenter(NodeTransformer):
    """Rewrites a syntax tree so that statements, loops and plain Python operations deduct their cost."""

    def __init__(self) -> None:
        self.literals: set[str] = set()  # strings and attribute names in the template

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        if isinstance(node, _REFUSED_NODES):
            raise SecurityError(f"'{type(node).__name__.lower()}' is not allowed in chat templates")
        if isinstance(node, nodes.Const) and isinstance(node.value, str):
            self.literals.add(node.value)
        elif isinstance(node, nodes.Getattr):
            self.literals.add(node.attr)
        super().generic_visit(node, *args, **kwargs)
        for body in (getattr(node, "body", None), getattr(node, "else_", None)):
            if body:
                size = sum(1 for statement in body for _ in statement.find_all(nodes.Node)) + len(body)
                body.insert(0, nodes.ExprStmt(_hook("spend", nodes.Const(_NODE * size, lineno=node.lineno))))
        if isinstance(node, nodes.For):
            node.iter = _hook("each", node.iter)
        elif isinstance(node, nodes.Compare | nodes.Operand):
            node.expr = _hook("read", node.expr)
        elif isinstance(node, nodes.Concat):
            return _hook("concat", nodes.List(node.nodes, lineno=node.lineno))
        elif (
            isinstance(node, nodes.List | nodes.Dict)
            or (isinstance(node, nodes.Tuple) and node.ctx == "load")
            or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice))
        ):
            return _hook("made", node)
        return node


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, on the budget."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=lambda value: _BUDGET.get().text(value),
            extensions=[_Generation, loopcontrols],
        )
        ours: dict[str, Callable[..., Any]] = {"join": _join, "sum": _sum, "list": list}
        ours["tojson"] = lambda x, *args, **kwargs: _BUDGET.get().json(x, *args, **kwargs)
        ours["format"] = lambda value, *a, **kw: _BUDGET.get().percent(_BUDGET.get().text(value), kw or a)
        ours |= {name: FILTERS[name] for name in _HEAVY}
        self.filters = {name: _metered(name, FILTERS[name], heavy=False) for name in _LIGHT}
        self.filters |= {name: _metered(name, function, heavy=True) for name, function in ours.items()}
        self.filters |= {f"<{name}>": functools.partial(_hooked, name) for name in ("spend", "each", "read", "made")}
        self.filters["<concat>"] = lambda values: _BUDGET.get().concat(map(_BUDGET.get().text, values))
        tests: Mapping[str, Any] = TESTS
        self.tests = {
            name: _metered(name, test, heavy=name not in _LIGHT_TESTS, test=True) for name, test in tests.items()
        }
        self.globals = {
            "range": self.globals["range"],
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Namespace,
            "cycler": Cycler,
            "joiner": Joiner,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self._functions = tuple(self.globals.values())

    def rewritten(self, source: str) -> tuple[nodes.Template, frozenset[str]]:
        """The instrumented syntax tree of a template, and the strings and attribute names in it."""
        if _reaches(3 * MAX_NODES, self.lex(source)):  # bounds the time for parsing
            raise LimitError("too large a program")
        tree, wrapper = self.parse(source), _Instrumenter()
        if _reaches(MAX_NODES, tree.find_all(nodes.Node)):
            raise LimitError("too large a program")
        wrapper.visit(tree)
        tree.set_environment(self)
        return tree, frozenset(wrapper.literals)

    def concat(self, parts: Iterable[str]) -> str:
        """Join the output of a macro or a set block."""
        return _BUDGET.get().concat(parts)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:  # noqa: ARG002 (Jinja's signature)
        """Allow only `_METHODS` and public attributes of Jinja's helpers."""
        for kind, names in _METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        return isinstance(obj, LoopContext | Macro | Cycler | Namespace) and not attr.startswith("_")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Replace `str.format` and `str.format_map`."""
        pattern, name = getattr(value, "__self__", None), getattr(value, "__name__", None)
        if not isinstance(pattern, str) or name not in ("format", "format_map"):
            return None
        return _Format(self, str(pattern), is_map=name == "format_map")

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Deduct the key's size: tuples are hashed element by element."""
        _BUDGET.get().spend(_NODE)
        return super().getitem(obj, argument if type(argument) in (str, int) else _BUDGET.get().read(argument))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:  # noqa: ARG002 (as above)
        """Apply an operator if its result is not too large."""
        return _BUDGET.get().operate(operator, self.binop_table[operator], left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (as above)
        """Call one of the allowed callables."""
        budget, owner = _BUDGET.get(), getattr(__obj, "__self__", None)
        budget.spend(_CALL)
        if isinstance(owner, str | dict | list | tuple):
            given = {key: value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars")}
            for arg in (*args, *given.values(), *(() if isinstance(owner, dict) else (owner,))):
                budget.read(arg)
            if isinstance(owner, str):
                budget.allow(__obj.__name__, owner, args, given)
                if __obj.__name__ in ("split", "rsplit"):
                    return budget.split(__obj, *args, **given)
                if __obj.__name__ == "join" and len(args) == 1:
                    args = ([*budget.each(args[0])],)
                    budget.fits(sum(budget.weight(piece) + 6 * budget.weight(owner) for piece in args[0]))
        elif isinstance(__obj, LoopContext):  # {% for ... recursive %}
            args = tuple(map(budget.each, args))
        elif not (
            isinstance(__obj, Macro | Joiner | Undefined | _Format)
            or isinstance(owner, LoopContext | Cycler | _Generation)
            or any(__obj is function for function in __self._functions)
        ):
            raise SecurityError("this call is not allowed in chat templates")
        return budget.made(__context.call(__obj, *args, **kwargs))


_SANDBOX = _Sandbox()
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # aliases of one field; templates read the first two


def plain_messages(messages: object) -> list[dict[str, Any]]:
    """A conversation as plain data without fields that are None; raises TemplateError if it is malformed."""
    if not isinstance(messages, list | tuple) or not messages:
        raise TemplateError("messages: give a list of at least one message")
    result = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TemplateError(f"messages[{i}]: give an object with a string 'role'")
        plain = {key: item for key, item in plain_data(message, f"messages[{i}]").items() if item is not None}
        reasoning = next((plain[key] for key in REASONING_FIELDS if key in plain), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        result.append(plain)
    return result


def plain_tools(tools: object) -> list[dict[str, Any]] | None:
    """Tools, given as JSON schemas, as plain data."""
    if tools is None:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise TemplateError("tools: give a list of JSON schemas")
    return [plain_data(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


class ChatTemplate:
    """A compiled chat template; `special_tokens` (bos_token, ...) are variables it can use."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"chat template: longer than {MAX_SOURCE:,} characters")
        self.source, self.special_tokens = source, dict(special_tokens)
        token = _BUDGET.set(Budget())  # constants are evaluated while compiling
        try:
            tree, self.literals = _SANDBOX.rewritten(source)
            with warnings.catch_warnings():  # Python warns of odd expressions in what Jinja compiles
                warnings.simplefilter("ignore")
                self._template = _SANDBOX.from_string(tree)
        except Exception as e:  # an untrusted program may fail in any way
            line = f" (line {e.lineno})" if isinstance(e, jinja2.TemplateSyntaxError) else ""
            raise TemplateError(f"chat template: {_one_line(e)}{line}") from e
        finally:
            _BUDGET.reset(token)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """The prompt of a conversation; `extra` are further template variables such as `enable_thinking`."""
        variables: dict[str, Any] = {"documents": None, **self.special_tokens}
        variables |= {name: plain_data(value, name) for name, value in extra.items()}
        variables |= {"messages": plain_messages(messages), "tools": plain_tools(tools)}
        variables["add_generation_prompt"] = add_generation_prompt
        token = _BUDGET.set(Budget())
        try:
            pieces = self._template.root_render_func(self._template.new_context(variables))
            return _BUDGET.get().concat(pieces)
        except Exception as e:  # as above
            raise TemplateError(f"chat template: {_one_line(e)}") from e
        finally:
            _BUDGET.reset(token)


def _one_line(error: Exception) -> str:
    why = " ".join(str(error).split())[:500] or type(error).__name__
    return f"it exceeds a limit: {why}" if isinstance(error, LimitError) else why
