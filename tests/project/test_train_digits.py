"""examples/train_digits.py, as a user runs it, and by its parts: the losses are numpy's, and nothing is ever lost."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import pytest

import maia_rt
from tests.helpers.emulator import ROOT, environment, eventually, running

pytest.importorskip("sklearn", reason="pip install 'maia-rt[train]'")
pytest.importorskip("matplotlib", reason="pip install 'maia-rt[train]'")
SCRIPT = ROOT / "examples" / "train_digits.py"
EPOCHS = 30
SECONDS = 100


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_digits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


script = load_script()
Train = Callable[..., dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def digits() -> Any:
    return script.Digits()


@pytest.fixture(scope="module")
def reference(digits: Any) -> np.ndarray:
    """Losses of the whole training, in float64."""
    losses: np.ndarray = script.numpy_losses(script.Settings(), digits, EPOCHS)
    return losses


@pytest.fixture(scope="module")
def sockets() -> Iterator[list[str]]:
    """Four devices of one process."""
    with running(devices=4) as (_, paths):
        yield paths


@pytest.fixture
def train(sockets: list[str], digits: Any) -> Train:
    """Trains on so many devices, from the start or from a state, and returns the state."""
    def run(count: int, epochs: int, state: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        with contextlib.ExitStack() as stack:
            devices = [stack.enter_context(maia_rt.open(path)) for path in sockets[:count]]
            training = script.Training(devices, script.Settings(), digits)
            stack.callback(training.close)
            if state is not None:
                training.restore(state)
            while training.epoch < epochs:
                training.run_epoch()
            found: dict[str, np.ndarray] = training.state()
            return found

    return run


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Whether two states are the same bit for bit."""
    return bool(script.digest(one) == script.digest(other))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_losses_are_those_of_numpy_and_held_out_digits_are_known(train: Train, reference: np.ndarray,
                                                                 count: int) -> None:
    state = train(count, EPOCHS)
    away = np.abs(state["losses"] - reference) / np.maximum(reference, 0.01)
    assert away.max() <= script.TOLERANCE
    assert state["accuracies"][-1] > 0.95


def test_training_is_the_same_bit_for_bit_from_run_to_run(train: Train) -> None:
    for count in (1, 2, 4):
        assert same(train(count, 3), train(count, 3))


def test_a_resumed_training_is_the_one_that_was_never_interrupted(train: Train, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.npz"
    script.save(path, script.Settings(), train(2, 2))
    assert same(train(2, 4, script.load(path, script.Settings())), train(2, 4))


def test_a_training_goes_on_with_another_number_of_devices(train: Train, reference: np.ndarray) -> None:
    losses = train(3, 4, train(4, 2))["losses"]
    assert (np.abs(losses - reference[:4]) / np.maximum(reference[:4], 0.01)).max() <= script.TOLERANCE


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    path = tmp_path / "checkpoint.npz"
    script.save(path, script.Settings(), {"weights": random.standard_normal(1000).astype(np.float32)})
    return path


def test_a_checkpoint_leaves_nothing_else_behind(checkpoint: Path) -> None:
    assert [entry.name for entry in checkpoint.parent.iterdir()] == ["checkpoint.npz"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(checkpoint: Path) -> None:
    before = checkpoint.read_bytes()
    with pytest.raises(TypeError):
        script.save(checkpoint, script.Settings(), {"weights": np.zeros(3), 5: np.zeros(3)})
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("place", [0, 100, 1000, 3000, -1000, -100, -1])
def test_a_damaged_checkpoint_is_refused(checkpoint: Path, place: int) -> None:
    content = bytearray(checkpoint.read_bytes())
    content[place] ^= 0x10
    checkpoint.write_bytes(content)
    with contextlib.suppress(click.UsageError):
        # A flipped bit may lie in what zip files hold twice or do not need; then nothing is lost.
        loaded = script.load(checkpoint, script.Settings())
        assert np.array_equal(loaded["weights"], np.random.default_rng(0).standard_normal(1000).astype(np.float32))


def test_weights_that_were_changed_are_found_by_the_checksum(checkpoint: Path) -> None:
    with np.load(checkpoint) as file:
        arrays = dict(file)
    arrays["weights"][7] += 1
    np.savez(checkpoint, **arrays)
    with pytest.raises(click.UsageError, match="its checksum is another"):
        script.load(checkpoint, script.Settings())


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04" + bytes(100)])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(click.UsageError, match="is no checkpoint"):
        script.load(tmp_path / "other", script.Settings())


def test_a_checkpoint_goes_on_with_its_own_settings_only(checkpoint: Path) -> None:
    with pytest.raises(click.UsageError, match=r"hidden=128.*not with.*hidden=64"):
        script.load(checkpoint, script.Settings(hidden=64))


# --- as a user -------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", str(SCRIPT), *arguments]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=folder, env=user_environment(), capture_output=True, text=True,
                          timeout=SECONDS, check=False)


def user_environment() -> dict[str, str]:
    found = environment()
    return {**found, "PYTHONPATH": os.pathsep.join([str(ROOT / "tools"), found["PYTHONPATH"]]), "COLUMNS": "100"}


def test_one_command_trains_and_draws_the_curve(tmp_path: Path) -> None:
    done = run(tmp_path, "--devices", "2")
    assert done.returncode == 0, done.stderr
    right = re.search(r"([\d.]+)% of 360 held-out digits right", done.stdout)
    assert right is not None and float(right[1]) > 95
    assert f"{EPOCHS}/{EPOCHS}" in done.stderr, "the progress bar"
    assert (tmp_path / "train_digits.out/loss.png").read_bytes().startswith(b"\x89PNG")
    again = run(tmp_path, "--devices", "2")
    assert again.returncode == 2 and "--resume" in again.stderr, "a checkpoint is not overwritten by mistake"


@pytest.mark.parametrize("arguments, words", [
    (["--resume"], "there is no checkpoint"), (["--lose", "2"], "no device 2"), (["--devices", "0"], "--devices"),
    (["--batch", "1438"], "--batch"), (["--rate", "2"], "--rate")])
def test_wrong_usage_is_said_before_anything_starts(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "--device", f"{tmp_path}/none")
    assert done.returncode == 3 and f"{tmp_path}/none" in done.stderr and "Traceback" not in done.stderr


def test_a_device_pulled_half_way_ends_in_an_error_and_the_rest_go_on(tmp_path: Path) -> None:
    done = run(tmp_path, "--devices", "4", "--epochs", "4", "--lose", "2")
    assert done.returncode == 5, done.stderr
    assert "Traceback" not in done.stderr and "--resume" in done.stderr
    rest = run(tmp_path, "--devices", "3", "--epochs", "4", "--resume", "--json")
    assert rest.returncode == 0, rest.stderr
    figures = json.loads(rest.stdout)
    assert (figures["version"], figures["devices"], figures["epochs"]) == (1, 3, 4)
    assert figures["difference"] <= figures["tolerance"]


def test_a_device_whose_process_is_killed_ends_in_an_error_and_the_rest_go_on(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        paths = [stack.enter_context(running())[1][0]]
        with pytest.raises(AssertionError, match="exit code -9"), running() as (victim, doomed):
            training = subprocess.Popen(
                command("--device", paths[0], "--device", doomed[0], "--epochs", "10000"), cwd=tmp_path,
                env=user_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            with training:
                kept = tmp_path / "train_digits.out/checkpoint.npz"
                try:
                    assert eventually(kept.exists, SECONDS), "no epoch was finished"
                    victim.send_signal(signal.SIGKILL)
                    _, error = training.communicate(timeout=SECONDS)
                finally:
                    training.kill()
            assert training.returncode == 5, error
            assert "Traceback" not in error and "--resume" in error
        epochs = len(script.load(kept, script.Settings())["losses"])
        rest = run(tmp_path, "--device", paths[0], "--epochs", str(epochs + 2), "--resume", "--json")
        assert rest.returncode == 0, rest.stderr
        assert json.loads(rest.stdout)["epochs"] == epochs + 2
