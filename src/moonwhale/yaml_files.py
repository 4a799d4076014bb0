"""Writes YAML, and reads YAML that may come from elsewhere: every fault is a UserError of one line, and nothing is
expanded unseen.
"""

import os
from pathlib import Path

import yaml

from moonwhale.errors import UserError, one_line, printable
from moonwhale.files import read_text, write_whole

FILE_BYTES = 1 << 18  # PyYAML reads about 100 KB in a second
LONGEST_NUMBER = 1000  # characters: Python's time to read a number grows with the square of its length
MOST_VALUES = 10_000  # in a document whose aliases are replaced by what they name
NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}


def read_yaml_file(path: str | os.PathLike) -> object:
    """Returns what a YAML file holds. Raises UserError if it cannot be read or is not plain data."""
    return parse_yaml(read_text(Path(path), FILE_BYTES), str(path))


def parse_yaml(text: str, source: str) -> object:
    """Returns what a text in YAML says, as plain data.

    Raises:
        UserError: it is not YAML, holds a value that cannot be made, or repeats a key; or aliases make it endless or
            large. The message begins with `source`.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or one_line(error)
        raise UserError(f"{source}{where} is not YAML: {printable(one_line(problem), '')}") from error
    except Exception as error:  # the constructors of numbers, dates and bytes raise their own kinds
        raise UserError(f"{source} holds a value that YAML cannot read: {printable(one_line(error), '')}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _count(node: yaml.Node, counted: dict[int, int | None]) -> int:
    """Returns how many values a node holds if each alias is replaced by what it names.

    Raises:
        UserError: there are too many, a number is too long, a node holds itself, or a mapping has a key twice.
    """
    line = f"line {node.start_mark.line + 1}"
    if isinstance(node, yaml.ScalarNode):
        if node.tag in NUMBERS and len(node.value) > LONGEST_NUMBER:
            raise UserError(f"{line}: this number has more than {LONGEST_NUMBER:,} characters")
        return 1
    if id(node) in counted:
        if counted[id(node)] is None:
            raise UserError(f"{line}: a value holds itself")
        return counted[id(node)]
    counted[id(node)] = None  # its count is not known yet
    inner = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if len(set(keys)) < len(keys):
            repeated = max(keys, key=keys.count) if len(keys) < 1000 else "a key"
            raise UserError(f"{line}: {printable(repeated, '')[:100]} occurs twice")
    total = 1
    for part in inner:
        total += _count(part, counted)
        if total > MOST_VALUES:
            raise UserError(f"{line}: this is more than {MOST_VALUES:,} values, with aliases replaced")
    counted[id(node)] = total
    return total


def write_yaml(path: str | os.PathLike, values: dict, comment: str) -> None:
    """Writes a mapping as YAML, atomically."""
    write_whole(path, to_yaml(values, comment))


def to_yaml(values: dict, comment: str) -> str:
    """Returns a mapping as YAML, below a comment of one line."""
    return f"# {comment}\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
