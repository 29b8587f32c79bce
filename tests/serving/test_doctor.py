"""The examination of a machine, and the refusal to expose a Triton that callers can crash."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from imprompt_serving.launcher import LaunchError, doctor
from imprompt_serving.launcher.addresses import check_exposure
from imprompt_serving.launcher.install import KNOWN_FAULTS, PIP_VERSION, TritonInstall


def triton(version: str) -> TritonInstall:
    nowhere = Path("nowhere")
    return TritonInstall(
        version=version, binary=nowhere, backends=nowhere, caches=nowhere, libraries=None, stub=nowhere
    )


def test_machine_without_triton_has_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> TritonInstall:
        raise LaunchError("no Triton found")

    monkeypatch.setattr(doctor, "find_triton", missing)
    errors = [finding for finding in doctor.examine() if finding.verdict == "error"]
    assert [(finding.subject, finding.text) for finding in errors] == [("Triton", "no Triton found")]


def test_known_faults_of_the_triton_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_triton", lambda: triton(PIP_VERSION))
    warnings = [finding.text for finding in doctor.examine() if finding.subject == "Triton"][1:]
    assert warnings == [f"known fault: {fault}" for fault in KNOWN_FAULTS[PIP_VERSION]]


def test_small_shared_memory_is_a_warning_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/dev/shm")._replace(free=64 * doctor.MEGABYTE)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    [found] = [finding for finding in doctor.examine() if finding.subject == "/dev/shm"]
    assert (found.verdict, found.text) == (
        "warning",
        "64 MB free; in a container, set its size (docker run --shm-size=2g)",
    )


def test_repository_without_bundles_is_an_error(tmp_path: Path) -> None:
    assert doctor.examine(tmp_path)[-1].text == f"no bundle in {tmp_path}"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.3.2.1"])
def test_loopback_is_allowed_with_any_triton(host: str) -> None:
    check_exposure(host, triton(PIP_VERSION))


def test_other_addresses_are_refused_if_callers_can_crash_triton() -> None:
    with pytest.raises(LaunchError, match=r"callers can crash Triton 2\.51\.0: .*--allow-remote"):
        check_exposure("0.0.0.0", triton(PIP_VERSION))
    check_exposure("0.0.0.0", triton("2.70.0"))
    check_exposure("0.0.0.0", triton(""))
