"""The compiled steps under the address and undefined-behaviour sanitizers. `make sanitize` runs more rounds."""

import shutil
import subprocess
import sys

import fuzz
import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="compiled steps are for Linux")
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_random_shapes_and_absurd_values_leave_no_array():
    if not fuzz.sanitizers():
        pytest.skip("g++ has no sanitizers here")
    done = subprocess.run([sys.executable, fuzz.__file__, "4"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "4 rounds without a finding" in done.stdout
