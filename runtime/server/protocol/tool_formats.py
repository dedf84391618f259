"""Formats in which models write calls of tools.

hermes   <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>            Hermes, Qwen
         <tool_call><function=f><parameter=x>1</parameter></function></tool_call>  Qwen coders
         <tool_call>f <arg_key>x</arg_key><arg_value>1</arg_value></tool_call>     GLM
mistral  [TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}]      or  [TOOL_CALLS]f[ARGS]{"x": 1}
llama    {"name": "f", "parameters": {"x": 1}}                   or  [f(x=1)]
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Schemas = Mapping[str, Mapping[str, Any]]
"""JSON schemas of functions' arguments, by name."""

_DECODER = json.JSONDecoder()
_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)(?:</function>\s*|$)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?(?:</parameter>|$)", re.DOTALL)
_GLM = re.compile(r"\s*([^\s<{]+)\s*((?:<arg_key>.*)?)$", re.DOTALL)
_GLM_PAIR = re.compile(r"<arg_key>\s*(.*?)\s*</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_MISTRAL = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\][\w-]+)?(?:\[ARGS\])?\s*(?=\{)")


class Call(NamedTuple):
    """The call of a function, its arguments as JSON."""

    name: str
    arguments: str


def arguments_of(value: Any) -> str:
    """The arguments of a call as JSON. Raises ValueError where they are no object."""
    if isinstance(value, str):
        value = json.loads(value)
    if not isinstance(value, dict):
        raise ValueError("the arguments are no object")
    return json.dumps(value, ensure_ascii=False)


def calls_of_json(value: Any) -> list[Call]:
    """The calls of an object with a name and arguments, or of a list of them. Raises ValueError."""
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(one, dict) and isinstance(one.get("name"), str)
                            for one in calls):  # fmt: skip
        raise ValueError("no call has a name")
    return [
        Call(one["name"], arguments_of(one.get("arguments", one.get("parameters", {}))))
        for one in calls
    ]


def read_tagged(block: str, schemas: Schemas) -> list[Call]:
    """The calls between <tool_call> and </tool_call>. Raises ValueError."""
    if block.lstrip().startswith(("{", "[")):
        return calls_of_json(json.loads(block))
    if functions := _FUNCTION.findall(block):
        return [_typed(name, _PARAMETER.findall(inner), schemas) for name, inner in functions]
    if found := _GLM.match(block):
        return [_typed(found[1], _GLM_PAIR.findall(found[2]), schemas)]
    raise ValueError("no call")


def _typed(name: str, pairs: list[tuple[str, str]], schemas: Schemas) -> Call:
    """A call whose arguments are text: JSON, but where the schema says that they are strings."""
    properties = schemas.get(name, {}).get("properties")
    kinds = properties if isinstance(properties, dict) else {}
    return Call(name, arguments_of({key: _value(text, kinds.get(key)) for key, text in pairs}))


def _value(text: str, schema: Any) -> Any:
    if isinstance(schema, dict) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text, parse_constant=str)
    except ValueError:
        return text


def read_mistral(block: str) -> list[Call]:
    """The calls after [TOOL_CALLS]. Raises ValueError."""
    named = _MISTRAL.match(block)
    if not named:
        return calls_of_json(json.loads(block))
    arguments, end = _DECODER.raw_decode(block, named.end())
    call, rest = Call(named[1], arguments_of(arguments)), block[end:].strip()
    return [call, *(read_mistral(rest) if rest else [])]


def read_beginning(text: str, schemas: Schemas) -> list[Call]:
    """The calls that are a whole text. Raises ValueError."""
    for mark in ("<|python_tag|>", "<|python_start|>", "<|python_end|>"):
        text = text.replace(mark, "")
    text = text.strip()
    try:
        return [call for value in _values(text) for call in _of_tools(value, schemas)]
    except ValueError:
        return _python_calls(text)


def _of_tools(value: Any, schemas: Schemas) -> list[Call]:
    """Calls of the tools: text of other JSON objects is no call."""
    calls = calls_of_json(value)
    if not all(call.name in schemas for call in calls):
        raise ValueError("no tool has this name")
    return calls


def _values(text: str) -> Iterator[Any]:
    """JSON values one after the other, with ; between them."""
    at = 0
    while at < len(text):
        value, at = _DECODER.raw_decode(text, at)
        yield value
        while at < len(text) and (text[at].isspace() or text[at] == ";"):
            at += 1


def _python_calls(text: str) -> list[Call]:
    """The calls in a Python list such as [f(x=1)]. Raises ValueError."""
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, MemoryError) as error:
        raise ValueError("no list of calls") from error
    if not isinstance(tree, ast.List) or not tree.elts:
        raise ValueError("no list of calls")
    return [_python_call(node) for node in tree.elts]


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args or not isinstance(node.func, ast.Name):
        raise ValueError("no call with named arguments")
    arguments = {
        keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg
    }
    try:
        return Call(node.func.id, arguments_of(arguments))
    except TypeError as error:
        raise ValueError("an argument is no JSON") from error
