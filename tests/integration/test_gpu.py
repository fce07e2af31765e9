"""The tests of tests/gpu, on a simulated GPU, in a process of their own: the device is registered for good."""

import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.integration
def test_simulated_gpu():
    registration = pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no Python backend for PrivateUse1")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6_000:]
