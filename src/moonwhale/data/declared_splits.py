"""The splits that a hub set's README.md declares: the `configs:` in the YAML at its top, with the files of each split.

configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: [data/test-*, more/test.csv]}
"""

import os
from pathlib import Path

from moonwhale.data.globs import expand
from moonwhale.errors import UserError, did_you_mean, printable
from moonwhale.files import read_text
from moonwhale.yaml_files import parse_yaml

README = "README.md"
README_BYTES = 1 << 22


def declared_splits(folder: Path, configuration: str | None, spec: str) -> dict[str, list[Path]] | None:
    """Returns the files of each split of a configuration, in the order in which README.md declares the splits.

    Args:
        configuration: its name; by default the one that README.md says is the default, or the only one.
        spec: what the user named, for errors.

    Returns:
        None if there is no README.md, or if it declares no files.

    Raises:
        UserError: the declaration cannot be read, names files outside of the folder, or has no such configuration.
    """
    if not (folder / README).is_file():
        return None
    head = _front_matter(read_text(folder / README, README_BYTES))
    values = parse_yaml(head, str(folder / README)) if "configs:" in head else None
    configs = values.get("configs") if isinstance(values, dict) else None
    if not isinstance(configs, list) or not all(isinstance(config, dict) for config in configs):
        configs = []
    with_files = {str(config.get("config_name", "default")): config for config in configs if "data_files" in config}
    if not with_files and not configuration:
        return None
    config = with_files[_choose(with_files, configuration, spec)]
    return _files_of_splits(folder, config)


def _front_matter(text: str) -> str:
    """Returns the YAML between two lines `---` at the top, or "" if there is none."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if not text.startswith("---\n"):
        return ""
    head, end, _ = text.removeprefix("---").partition("\n---")
    return head if end else ""


def _choose(configs: dict[str, dict], configuration: str | None, spec: str) -> str:
    defaults = [name for name, config in configs.items() if config.get("default") is True]
    chosen = configuration or next(iter([*defaults, *(["default"] if "default" in configs else [])]), None)
    if chosen is None and len(configs) == 1:
        chosen = next(iter(configs))
    if chosen not in configs:
        names = [printable(name, "") for name in configs]
        what = f"has no configuration {chosen}{did_you_mean(chosen, names)}" if chosen else "needs a configuration"
        raise UserError(f"`data`: {spec} {what}: name the folder as FOLDER:NAME, with one of {', '.join(names[:12])}")
    return chosen


def _files_of_splits(folder: Path, config: dict) -> dict[str, list[Path]]:
    declared = config["data_files"]
    if isinstance(declared, str) or (isinstance(declared, list) and all(isinstance(path, str) for path in declared)):
        declared = [{"split": "train", "path": declared}]
    splits: dict[str, list[Path]] = {}
    base = config.get("data_dir") or ""
    for entry in declared if isinstance(declared, list) else [None]:
        paths = entry.get("path") if isinstance(entry, dict) else None
        patterns = [paths] if isinstance(paths, str) else paths
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in [*patterns, base]):
            raise UserError(f"`data`: cannot read {folder / README}: `configs` has data_files without split and path")
        files = splits.setdefault(str(entry.get("split", "train")), [])
        files += [file for pattern in patterns for file in _matches(folder, os.path.join(base, pattern))]
    return {split: list(dict.fromkeys(files)) for split, files in splits.items()}


def _matches(folder: Path, pattern: str) -> list[Path]:
    """Returns the files in the folder that a pattern of README.md names, sorted."""
    if os.path.isabs(pattern) or ".." in Path(pattern).parts or "://" in pattern:
        raise UserError(f"`data`: {folder / README} names files outside of its folder: {printable(pattern, '')[:200]}")
    return expand(folder, pattern)
