"""The arguments of comparisons at toy size."""

import pytest

from toy import TOY

OPTIONS = (
    "--context 32 --batch-size 2 --tokens-per-step 128 --warmup-steps 1 --eval-rows 4 --device cpu --precision fp32"
)
ARGUMENTS = OPTIONS.split(" ")
ARGUMENTS += [f"--model.{name}={'[1]' if name.startswith('moba_full') else value}" for name, value in TOY.items()]


@pytest.fixture(scope="module")
def arguments(text_folder, tmp_path_factory):
    """The common arguments of all comparisons. They share a cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOONWHALE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield ["compare", "--data", str(text_folder), *ARGUMENTS]
