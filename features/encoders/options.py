"""The tail of a specification: `timm/resnet50+pool=mean+layer=-2` -> `timm/resnet50` and its options."""

import difflib
import re
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from features.errors import EncoderError

OptionsT = TypeVar("OptionsT", bound=BaseModel)

_OPTION = re.compile(r"\+([a-z][a-z0-9_]*)=([^+=]*)$")
"""Neither a shell nor YAML minds a plus sign, and no hub has one in a name."""


def split_options(spec: str) -> tuple[str, dict[str, str]]:
    """Take `+name=value` off the end of a specification, as often as it is there.

    Raises:
        EncoderError: An option is there twice.
    """
    options: dict[str, str] = {}
    rest = spec
    while match := _OPTION.search(rest):
        name, value = match[1], match[2]
        if name in options:
            raise EncoderError(f"encoder {spec!r} has the option {name!r} twice; leave one of them out.")
        options[name] = value
        rest = rest[: match.start()]
    return rest, dict(reversed(options.items()))


def join_options(base: str, options: dict[str, str]) -> str:
    """What `split_options` takes apart."""
    return base + "".join(f"+{name}={value}" for name, value in options.items())


def read_options(spec: str, options_type: type[OptionsT]) -> tuple[str, OptionsT]:
    """Split a specification and check its options against what its family knows.

    Args:
        spec: As a person typed it.
        options_type: A frozen model that forbids extra keys; values are parsed from strings.

    Raises:
        EncoderError: An unknown option, with the near match, or a value that it cannot have.
    """
    base, options = split_options(spec)
    for name in options:
        if name not in options_type.model_fields:
            known = sorted(options_type.model_fields)
            near = difflib.get_close_matches(name, known, n=1)
            expected = f"its options: {', '.join(known)}" if known else "it takes no options"
            hint = f"did you mean {near[0]!r}?" if near else f"{expected}."
            raise EncoderError(f"encoder {spec!r} has no option {name!r}; {hint}")
    try:
        return base, options_type.model_validate(options)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in problem["loc"])
        said = str(problem["msg"]).removeprefix("Value error, ")
        raise EncoderError(
            f"encoder {spec!r}: option {place} is {problem['input']!r}; {said[:1].lower()}{said[1:]}."
        ) from error
