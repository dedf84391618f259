"""Tools that a chat may call, and whether it must."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Parameters = dict[str, Any]


class Function(BaseModel):
    """A function that the client can run."""

    model_config = ConfigDict(extra="ignore")
    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    parameters: Parameters | None = None
    strict: bool | None = None

    @property
    def schema_of_arguments(self) -> Parameters:
        return self.parameters or {"type": "object", "properties": {}}


class Tool(BaseModel):
    """One entry of `tools`."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["function"]
    function: Function

    @property
    def rendered(self) -> dict[str, Any]:
        """The entry as chat templates read it."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        parameters = {"parameters": self.function.schema_of_arguments}
        return {"type": "function", "function": function | parameters}


class FunctionName(BaseModel):
    """Name of a function."""

    name: str


class NamedChoice(BaseModel):
    """The one function that has to be called."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedChoice


def function_named(tools: list[Tool], name: str) -> Function:
    """The function with a name. Raises ValueError where no tool has it."""
    found = next((tool.function for tool in tools if tool.function.name == name), None)
    if found is None:
        raise ValueError(f"tool_choice names {name!r:.60}, which is none of the tools")
    return found


def schema_of_calls(tools: list[Tool], most: int | None) -> dict[str, Any]:
    """The JSON schema of a list of calls, one at least. most: calls at the most.

    Definitions move to the top, where their references look for them. Raises ValueError where two
    tools define one name differently.
    """
    shared: dict[str, dict[str, Any]] = {"$defs": {}, "definitions": {}}
    calls = []
    for tool in tools:
        parameters = dict(tool.function.schema_of_arguments)
        for place, found in shared.items():
            for name, definition in (parameters.pop(place, None) or {}).items():
                if found.setdefault(name, definition) != definition:
                    raise ValueError(f"tools: two of them define {name!r:.60} differently")
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    "parameters": parameters,
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    bounds = {"minItems": 1} | ({} if most is None else {"maxItems": most})
    return (
        {"type": "array", "items": {"anyOf": calls}}
        | bounds
        | {place: found for place, found in shared.items() if found}
    )
