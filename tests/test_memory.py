"""Memory that is freed is not asked for again: counted by the system, page by page."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = """
import resource, sys
import torch
from unlabel.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    return [torch.ones(4 << 18) for _ in range(40)]  # 4 MB each
step()
before = faults()
for _ in range(5):
    step()
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is done")
def test_a_step_takes_the_memory_of_the_one_before():
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "ssl")])}
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", CODE, kind], env=env, stdout=subprocess.PIPE, check=True).stdout)
        for kind in ("kept", "given back")
    )
    if given_back < 5 * 40 * 1024 / 10:  # a tenth of the pages of 4 kB
        pytest.skip("this malloc keeps it anyway, or this system gives more than a page at once")
    assert kept < 0.7 * given_back
