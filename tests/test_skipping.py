"""In CI nothing but tests that need an accelerator may be skipped: the plugin that sees to it, on a planted skip."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.quick

TEST = "def test_planted():\n    pass\ndef test_other():\n    pass\n"
MARKED = "import pytest\n@pytest.mark.gpu\n@pytest.mark.skip(reason='no accelerator')\n" + TEST
UNMARKED = "import pytest\n@pytest.mark.skip(reason='planted')\n" + TEST
WHOLE_FILE = "import pytest\npytest.skip('planted', allow_module_level=True)\n" + TEST


@pytest.mark.parametrize(
    ("plugin", "planted", "ci", "num_processes", "status"),
    [
        ("conftest", UNMARKED, "true", 0, 1),  # which has the other for all tests
        ("only_gpu_skips", UNMARKED, "true", 2, 1),
        ("only_gpu_skips", WHOLE_FILE, "true", 0, 1),
        ("only_gpu_skips", WHOLE_FILE, "true", 2, 1),
        ("only_gpu_skips", MARKED, "true", 0, 0),
        ("only_gpu_skips", UNMARKED, "", 0, 0),
    ],
)
def test_in_ci_only_tests_that_need_an_accelerator_may_be_skipped(tmp_path, plugin, planted, ci, num_processes, status):
    (tmp_path / "test_planted.py").write_text(planted)
    (tmp_path / "test_passing.py").write_text(TEST)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "tests" / "pytest.ini"), "-p", plugin]
    command += ["--rootdir", str(tmp_path), "-n", str(num_processes), str(tmp_path)]
    environment = dict(os.environ, CI=ci, PYTHONPATH=str(ROOT / "tests"))
    assert subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True).returncode == status
