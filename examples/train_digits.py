"""Training on several devices: a small network learns scikit-learn's handwritten digits, data-parallel.

Each device holds all weights and takes its share of every batch; the sum of their gradients is formed by an all-reduce
over the devices' own paths, and each device takes the same step of SGD with momentum. The losses are compared with
those of the same training in numpy, in float64.

    python examples/train_digits.py --devices 4
    python examples/train_digits.py --devices 4 --out run --lose 2      # device 2 is pulled half way: an error, and
    python examples/train_digits.py --devices 3 --out run --resume      # the rest go on from the last checkpoint
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from maia_tools.failure import FAULT, TIMEOUT, exit_code, explain
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import maia_rt
from maia_rt import kernels
from maia_rt.contract import program
from maia_rt.errors import ClosedError

PIXELS, CLASSES, HELD_OUT = 64, 10, 360
TOLERANCE = 1e-3
"""How far a batch's loss may be from numpy's, in parts of it, or of 0.01 where it is less."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What, beside the data, decides every weight: a checkpoint goes on with its own settings only."""

    hidden: int = 128
    batch: int = 64
    rate: float = 0.2
    momentum: float = 0.9
    seed: int = 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters, in the order in which they lie end to end."""
        return {"w1": (PIXELS, self.hidden), "b1": (self.hidden,), "w2": (self.hidden, CLASSES), "b2": (CLASSES,)}

    def spans(self) -> dict[str, slice]:
        """Where each lies in the one buffer of all; each starts at a multiple of 256 bytes."""
        spans, start = {}, 0
        for name, shape in self.shapes.items():
            spans[name] = slice(start, start + int(np.prod(shape)))
            start = -(-spans[name].stop // 64) * 64
        return spans

    @property
    def elements(self) -> int:
        """Of that buffer."""
        return max(span.stop for span in self.spans().values())

    def first_weights(self) -> np.ndarray:
        """Normally distributed, by He's rule; biases are 0."""
        weights = np.zeros(self.elements, np.float32)
        random = np.random.default_rng(self.seed)
        for name, shape in self.shapes.items():
            if len(shape) == 2:
                values = random.standard_normal(shape) * np.sqrt(2 / shape[0])
                weights[self.spans()[name]] = values.ravel()
        return weights


class Digits:
    """1,437 digits to learn from and 360 to be tried on, the same ones each time."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        x, label = load_digits(return_X_y=True)
        order = np.random.default_rng(1797).permutation(len(x))
        self.x, self.label = (x[order] / 16).astype(np.float32), label[order].astype(np.int32)
        self.test_x, self.test_label = self.x[-HELD_OUT:], self.label[-HELD_OUT:]
        self.x, self.label = self.x[:-HELD_OUT], self.label[:-HELD_OUT]

    def batches(self, settings: Settings, epoch: int) -> np.ndarray:
        """Indices (batches, batch) of an epoch: another order each time, that the seed decides."""
        count = len(self.x) // settings.batch
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(self.x))
        return order[: count * settings.batch].reshape(count, settings.batch)


class Replica:
    """One device's copy of the network, and its share of each batch."""

    def __init__(self, device: maia_rt.Device, settings: Settings, count: int, share: slice, rows: int) -> None:
        self.device, self.settings, self.share, self.rows = device, settings, share, rows
        self.stream = device.create_stream()
        hidden, can = settings.hidden, device.capabilities.program
        images = [
            kernels.matmul(can, rows, hidden, PIXELS, bias=True, relu=True, name="layer1"),
            kernels.matmul(can, rows, CLASSES, hidden, bias=True, name="layer2"),
            kernels.cross_entropy(can, rows, CLASSES, scale=1 / settings.batch, name="loss"),
            kernels.matmul(can, hidden, CLASSES, rows, transpose_a=True, name="gradient_w2"),
            kernels.column_sum(can, rows, CLASSES, name="gradient_b2"),
            kernels.matmul(can, rows, hidden, CLASSES, transpose_b=True, name="back"),
            kernels.relu_gradient(can, rows * hidden, name="back_relu"),
            kernels.matmul(can, PIXELS, hidden, rows, transpose_a=True, name="gradient_w1"),
            kernels.column_sum(can, rows, hidden, name="gradient_b1"),
            kernels.sgd(can, settings.elements, name="sgd"),
            kernels.matmul(can, HELD_OUT, hidden, PIXELS, bias=True, relu=True, name="test1"),
            kernels.matmul(can, HELD_OUT, CLASSES, hidden, bias=True, name="test2"),
        ]
        self.kernels = device.load(program.write(images))
        self.x = device.allocate((count, rows, PIXELS), np.float32)
        self.label = device.allocate((count, rows), np.int32)
        self.loss = device.allocate((count, rows), np.float32)
        self.hidden = device.allocate((rows, hidden), np.float32)
        self.back = device.allocate((rows, hidden), np.float32)
        self.logits = device.allocate((rows, CLASSES), np.float32)
        self.slope = device.allocate((rows, CLASSES), np.float32)
        self.weights, self.speed, self.gradient = (device.allocate(settings.elements, np.float32) for _ in range(3))
        self.stream.fill(self.gradient, 0)
        spans = settings.spans()
        self.weight, self.slopes = ({name: whole[spans[name]].view(np.float32, shape) for name, shape in
                                     settings.shapes.items()} for whole in (self.weights, self.gradient))

    def load(self, digits: Digits, batches: np.ndarray) -> None:
        """Bring this device's rows of an epoch's batches; rows that there are too few of have no label."""
        mine = batches[:, self.share]
        x = np.zeros(self.x.shape, np.float32)
        label = np.full(self.label.shape, -1, np.int32)
        x[:, : mine.shape[1]], label[:, : mine.shape[1]] = digits.x[mine], digits.label[mine]
        self.stream.copy(self.x, x)
        self.stream.copy(self.label, label)

    def differentiate(self, batch: int) -> None:
        """Forward and back: the gradient of this device's rows, and their losses."""
        launch, kernel, weight, slopes = self.stream.launch, self.kernels, self.weight, self.slopes
        x, flat = self.x[batch], self.rows * self.settings.hidden
        launch(kernel["layer1"], x, weight["w1"], weight["b1"], self.hidden)
        launch(kernel["layer2"], self.hidden, weight["w2"], weight["b2"], self.logits)
        launch(kernel["loss"], self.logits, self.label[batch], self.loss[batch], self.slope)
        launch(kernel["gradient_w2"], self.hidden, self.slope, slopes["w2"])
        launch(kernel["gradient_b2"], self.slope, slopes["b2"])
        launch(kernel["back"], self.slope, weight["w2"], self.back)
        back = self.back.view(np.float32, flat)
        launch(kernel["back_relu"], self.hidden.view(np.float32, flat), back, back)
        launch(kernel["gradient_w1"], x, self.back, slopes["w1"])
        launch(kernel["gradient_b1"], self.back, slopes["b1"])

    def update(self) -> None:
        """A step down the gradient."""
        self.stream.launch(self.kernels["sgd"], self.weights, self.speed, self.gradient, self.settings.rate,
                           self.settings.momentum, 0.0)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Classes of the held-out digits."""
        stream, weight = self.stream, self.weight
        with self.device.upload(x, stream) as given, \
                self.device.allocate((HELD_OUT, self.settings.hidden), np.float32) as hidden, \
                self.device.allocate((HELD_OUT, CLASSES), np.float32) as logits:
            stream.launch(self.kernels["test1"], given, weight["w1"], weight["b1"], hidden)
            stream.launch(self.kernels["test2"], hidden, weight["w2"], weight["b2"], logits)
            return logits.copy_to_host(stream).argmax(1)


class Training:
    """Replicas on all devices, kept alike by an all-reduce of their gradients."""

    def __init__(self, devices: Sequence[maia_rt.Device], settings: Settings, digits: Digits) -> None:
        self.settings, self.digits = settings, digits
        bounds = np.linspace(0, settings.batch, len(devices) + 1).astype(int)
        rows = -(-int(np.diff(bounds).max()) // 16) * 16  # kernels take memory that starts at multiples of 64 bytes
        count = len(digits.x) // settings.batch
        self.replicas = [Replica(device, settings, count, slice(int(a), int(b)), rows)
                         for device, a, b in zip(devices, bounds, bounds[1:], strict=False)]
        self.streams = [replica.stream for replica in self.replicas]
        self.gradients = [replica.gradient for replica in self.replicas]
        self.ranks = maia_rt.Communicator(devices) if len(devices) > 1 else None
        self.epoch = 0
        self.losses = np.zeros((0, count))
        self.accuracies = np.zeros(0)
        self._put(settings.first_weights(), np.zeros(settings.elements, np.float32))

    def _put(self, weights: np.ndarray, speed: np.ndarray) -> None:
        for replica in self.replicas:
            replica.stream.copy(replica.weights, weights)
            replica.stream.copy(replica.speed, speed)

    def run_epoch(self) -> None:
        """All batches once, then a try on the held-out digits."""
        batches = self.digits.batches(self.settings, self.epoch)
        for replica in self.replicas:
            replica.load(self.digits, batches)
        for batch in range(len(batches)):
            for replica in self.replicas:
                replica.differentiate(batch)
            if self.ranks is not None:
                self.ranks.all_reduce(self.gradients, streams=self.streams)
            for replica in self.replicas:
                replica.update()
        losses = sum(replica.loss.copy_to_host(replica.stream).astype(np.float64).sum(1) for replica in self.replicas)
        weights = [replica.weights.copy_to_host(replica.stream) for replica in self.replicas]
        if any(not np.array_equal(weights[0], other) for other in weights[1:]):
            raise SystemExit("the replicas' weights differ: a gradient went wrong on its way")
        right = self.replicas[0].predict(self.digits.test_x) == self.digits.test_label
        self.epoch += 1
        self.losses = np.vstack([self.losses, losses / self.settings.batch])
        self.accuracies = np.append(self.accuracies, right.mean())

    def state(self) -> dict[str, np.ndarray]:
        """All that a later run needs to go on as if there had been no pause."""
        first = self.replicas[0]
        return {"weights": first.weights.copy_to_host(first.stream), "speed": first.speed.copy_to_host(first.stream),
                "losses": self.losses, "accuracies": self.accuracies}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go on from there."""
        self._put(state["weights"], state["speed"])
        self.losses, self.accuracies, self.epoch = state["losses"], state["accuracies"], len(state["losses"])

    def close(self) -> None:
        """Close what the devices do not close themselves."""
        if self.ranks is not None:
            self.ranks.close()


# --- checkpoints -----------------------------------------------------------------------------------------------------


def save(path: Path, settings: Settings, state: dict[str, np.ndarray]) -> None:
    """Write a checkpoint whole or not at all: beside the old one, to the disk, then in its place."""
    arrays = {**state, "settings": np.array(json.dumps(dataclasses.asdict(settings)))}
    packed = io.BytesIO()
    np.savez(packed, checksum=np.array(digest(arrays)), **arrays)  # type: ignore[arg-type]
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(beside, "wb") as file:
        file.write(packed.getvalue())
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def load(path: Path, settings: Settings) -> dict[str, np.ndarray]:
    """Read a checkpoint; one that is damaged or of other settings is refused."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = dict(file)
        sound = str(arrays.pop("checksum")) == digest(arrays)
        theirs = Settings(**json.loads(str(arrays.pop("settings"))))
    except FileNotFoundError:
        raise click.UsageError(f"there is no checkpoint {path} to go on from") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, RuntimeError, SyntaxError,
            zipfile.BadZipFile, zlib.error) as error:
        raise click.UsageError(f"{path} is no checkpoint, or a damaged one: {error}") from error
    if not sound:
        raise click.UsageError(f"{path} is damaged: its checksum is another")
    if theirs != settings:
        raise click.UsageError(f"{path} was made with {theirs}, not with {settings}")
    return arrays


def digest(arrays: dict[str, Any]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype.str} {array.shape}\n".encode() + array.tobytes())
    return found.hexdigest()


# --- the same in numpy -----------------------------------------------------------------------------------------------


def numpy_losses(settings: Settings, digits: Digits, epochs: int) -> np.ndarray:
    """Losses (epochs, batches) of the same training in float64."""
    spans = settings.spans()
    weights = settings.first_weights().astype(np.float64)
    speed, gradient = np.zeros_like(weights), np.zeros_like(weights)
    w1, b1, w2, b2 = (weights[spans[name]].reshape(shape) for name, shape in settings.shapes.items())
    losses = []
    for epoch in range(epochs):
        for batch in digits.batches(settings, epoch):
            x, label = digits.x[batch].astype(np.float64), digits.label[batch]
            hidden = np.maximum(x @ w1 + b1, 0)
            logits = hidden @ w2 + b2
            logits -= logits.max(1, keepdims=True)
            total = np.exp(logits).sum(1, keepdims=True)
            losses.append((np.log(total[:, 0]) - logits[np.arange(len(batch)), label]).mean())
            slope = (np.exp(logits) / total - (label[:, None] == np.arange(CLASSES))) / len(batch)
            back = slope @ w2.T * (hidden > 0)
            for name, part in {"w1": x.T @ back, "b1": back.sum(0), "w2": hidden.T @ slope, "b2": slope.sum(0)}.items():
                gradient[spans[name]] = part.ravel()
            speed[:] = settings.momentum * speed + gradient
            weights -= settings.rate * speed
    return np.reshape(losses, (epochs, -1))


# --- the command -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def emulated(count: int) -> Iterator[list[str]]:
    """One emulator process with several devices; yields what to open."""
    with tempfile.TemporaryDirectory(prefix="maia-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "maia_emulator", "--socket", f"{folder}/device", "--devices", str(count)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True)
        with process:
            try:
                lines = [process.stdout.readline() for _ in range(count)]  # type: ignore[union-attr]
                if not all(line.startswith("listening on ") for line in lines):
                    raise maia_rt.errors.DeviceNotFound("the emulator did not start")
                yield [line.removeprefix("listening on ").rstrip("\n") for line in lines]
            finally:
                process.terminate()


def plot(path: Path, losses: np.ndarray, reference: np.ndarray, accuracies: np.ndarray) -> None:
    """Losses of all batches, numpy's below them, and the accuracy after each epoch."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        left = figure.subplots()
        steps = np.arange(losses.size) / losses.shape[1]
        left.plot(steps, reference.ravel(), color="tab:orange", linewidth=3, alpha=0.5, label="numpy, float64")
        left.plot(steps, losses.ravel(), color="tab:blue", linewidth=0.8, label="devices")
        left.set(xlabel="epoch", ylabel="loss of a batch", yscale="log")
        left.legend(loc="center right")
        right = left.twinx()
        right.plot(np.arange(1, len(accuracies) + 1), 100 * accuracies, "k.:", linewidth=0.8)
        right.set(ylabel="held-out accuracy, %", ylim=(min(80, 100 * accuracies.min()), 100))
        figure.savefig(path, dpi=120)


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--devices", type=click.IntRange(1, 64), default=2, show_default=True, help="How many emulated devices.")
@click.option("--device", "selectors", multiple=True, metavar="SELECTOR", help="These devices instead; repeatable.")
@click.option("--epochs", type=click.IntRange(1, 10_000), default=30, show_default=True,
              help="In all, resumed or not.")
@click.option("--hidden", type=click.IntRange(1, 4096), default=Settings.hidden, show_default=True)
@click.option("--batch", type=click.IntRange(1, 1437), default=Settings.batch, show_default=True)
@click.option("--rate", type=click.FloatRange(0, 1), default=Settings.rate, show_default=True)
@click.option("--momentum", type=click.FloatRange(0, 1), default=Settings.momentum, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=Settings.seed, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default="train_digits.out", show_default=True,
              help="Where checkpoint.npz and loss.png go.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint there.")
@click.option("--lose", type=click.IntRange(0), metavar="NUMBER", help="Pull this device half way, to see it fail.")
@click.option("--json", "as_json", is_flag=True, help="Print figures as JSON.")
def main(devices: int, selectors: tuple[str, ...], epochs: int, out: Path, resume: bool, lose: int | None,
         as_json: bool, **choices: Any) -> None:
    settings = Settings(**choices)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.npz"
    if checkpoint.exists() and not resume:
        raise click.UsageError(f"{checkpoint} is there already: go on from it with --resume, or choose another --out")
    state = load(checkpoint, settings) if resume else None
    if lose is not None and lose >= (len(selectors) or devices):
        raise click.UsageError(f"there is no device {lose} to lose")
    with contextlib.ExitStack() as stack:
        names = selectors or stack.enter_context(emulated(devices))
        opened = [stack.enter_context(maia_rt.open(name)) for name in names]
        digits = Digits()
        training = Training(opened, settings, digits)
        stack.callback(training.close)
        if state is not None:
            training.restore(state)
        began, first = time.perf_counter(), training.epoch
        columns = (TextColumn("training on {task.fields[names]}"), BarColumn(), MofNCompleteColumn(),
                   TextColumn("{task.fields[state]}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=epochs, completed=first, state="",
                                     names=f"{len(opened)} device{'s' * (len(opened) > 1)}")
            while training.epoch < epochs:
                if lose is not None and training.epoch == epochs // 2:
                    opened[lose].inject("gone:now")
                training.run_epoch()
                save(checkpoint, settings, training.state())
                progress.update(task, completed=training.epoch,
                                state=f"loss {training.losses[-1].mean():.4f}, {training.accuracies[-1]:.1%} right")
        seconds = time.perf_counter() - began
        state = training.state()
    losses, accuracies = state["losses"], state["accuracies"]
    reference = numpy_losses(settings, digits, len(losses))
    difference = float((np.abs(losses - reference) / np.maximum(reference, 0.01)).max())
    plot(out / "loss.png", losses, reference, accuracies)
    samples = (len(losses) - first) * losses.shape[1] * settings.batch
    figures = {"version": 1, "devices": len(names), "epochs": len(losses), "loss": float(losses[-1].mean()),
               "accuracy": float(accuracies[-1]), "difference": difference, "tolerance": TOLERANCE,
               "seconds": seconds, "samples_per_second": samples / seconds, "state": digest(state)}
    if as_json:
        click.echo(json.dumps(figures))
    else:
        click.echo(f"{len(losses)} epochs: loss {figures['loss']:.5f}, {accuracies[-1]:.2%} of {HELD_OUT} held-out "
                   f"digits right, {figures['samples_per_second']:,.0f} samples/s\n"
                   f"losses within {difference:.1e} of numpy's (allowed {TOLERANCE:.0e}); {out}/loss.png shows both")
    if not difference <= TOLERANCE:
        raise click.ClickException("the losses are not numpy's")


if __name__ == "__main__":
    try:
        main(standalone_mode=True)
    except maia_rt.errors.MaiaError as failure:
        what, cause, hint = explain(failure)
        click.echo(f"{what}\n  cause: {cause}\n  try: {hint}", err=True)
        # A communicator that has failed refuses further calls; why it failed is what counts.
        code = exit_code(failure.__cause__ if isinstance(failure, ClosedError) and failure.__cause__ else failure)
        if code in (FAULT, TIMEOUT):
            click.echo("  the last checkpoint is whole: go on with --resume, on the devices that are left", err=True)
        sys.exit(code)
