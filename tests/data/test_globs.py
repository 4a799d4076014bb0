"""Globs name the files that the standard library's do, and take bounded time on any folder and pattern."""

import glob
import os
from pathlib import Path

import pytest

from moonwhale.data import globs
from moonwhale.data.loading import load_source
from moonwhale.data.local_files import find_files
from moonwhale.errors import UserError


@pytest.fixture
def folder(tmp_path):
    names = [
        "a.txt",
        "b/a.txt",
        "b/c/a.txt",
        "b/c/x.csv",
        "b/.h/a.txt",
        ".h/a.txt",
        "b/.a.txt",
        "d[1]/a.txt",
        "B/y.csv",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "broken.txt").symlink_to("nowhere")
    return tmp_path


PATTERNS = ["*.txt", "*/*.txt", "b/*", "b/*.txt", "b/.*.txt", ".h/*", ".*/*.txt", "*/c/*", "*x*", "?/a.txt", "./*.txt"]
PATTERNS += [
    "**/*.txt",
    "**/a.txt",
    "**/*",
    "**",
    "**/c/*",
    "b/**/*.csv",
    "**/b/**",
    "**/**/*.csv",
    "b/../*.txt",
    "b//c/*",
]
PATTERNS += ["[bB]/*.csv", "d[[]1]/*", "d[1]/*", "nothing/*", "a.txt/*"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_glob_names_the_files_that_the_standard_librarys_does(folder, pattern):
    expected = {Path(path) for path in glob.glob(f"{folder}/{pattern}", recursive=True) if os.path.isfile(path)}
    assert globs.expand(folder, pattern) == sorted(expected)


def test_a_folder_of_a_glob_may_have_any_name(folder):
    assert find_files(f"{folder}/d[1]/*.txt").files == [folder / "d[1]" / "a.txt"]


@pytest.fixture
def loops(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).symlink_to(".")
    (tmp_path / "t.txt").write_text("The whale sings.")
    return tmp_path


@pytest.mark.parametrize("pattern", ["**/*.txt", "/".join(["**"] * 60) + "/*.txt", "/".join(["*"] * 30) + "/*.txt"])
@pytest.mark.parametrize("declared", [False, True])
def test_links_to_a_folder_itself_are_followed_once(loops, pattern, declared):
    spec = f"{loops}/{pattern}"
    if declared:
        (loops / "README.md").write_text(f'---\nconfigs:\n- data_files: "{pattern}"\n---\n')
        spec = str(loops)
    assert list(load_source(spec)) == ["The whale sings."]


def test_a_link_may_have_the_name_that_a_glob_asks_for(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("a")
    (tmp_path / "train").symlink_to("real")
    assert globs.expand(tmp_path, "**/train/*.txt") == [tmp_path / "train" / "a.txt"]
    assert globs.expand(tmp_path, "**/*.txt") == [tmp_path / "real" / "a.txt"]


@pytest.mark.parametrize("spec", ["{}", "{}/**/*.txt"])
def test_folders_inside_one_another_without_an_end_are_refused(tmp_path, spec):
    tmp_path.joinpath(*["a"] * 101).mkdir(parents=True)
    with pytest.raises(UserError, match="has more than 100 folders inside one another"):
        find_files(spec.format(tmp_path))


@pytest.mark.parametrize("pattern", ["/".join(["*"] * 200), "[" * 5000])
def test_a_pattern_without_an_end_is_refused(tmp_path, pattern):
    with pytest.raises(UserError, match="has more than 100 parts or 4,096 characters") as caught:
        globs.expand(tmp_path, pattern)
    assert len(str(caught.value)) < 300
