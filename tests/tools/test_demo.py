"""``maia demo`` as a user runs it: a process, its output, its exit code."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.helpers.emulator import ROOT, environment, listening, spawn
from tests.helpers.stopwatch import promptly

LONG = "word " * 400


def command(*arguments):
    return [sys.executable, "-W", "error", "-m", "maia_tools.cli", "demo", *arguments]


def settings():
    env = environment()
    return env | {"PYTHONPATH": f"{env['PYTHONPATH']}{os.pathsep}{ROOT / 'tools'}", "COLUMNS": "100"}


def demo(*arguments, **options):
    return subprocess.run(command(*arguments), capture_output=True, env=settings(), timeout=110, **options)


@pytest.fixture(scope="module")
def shown():
    """The output for built-in sentences: (data, talk)."""
    done = demo("--repeat", "1")
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(), done.stderr.decode()


def test_last_line_is_the_difference_to_the_reference(shown):
    last = shown[0].rstrip("\n").splitlines()[-1]
    assert last.startswith("Largest difference to the float64 reference ")
    assert float(last.split()[6]) < 2e-5
    assert last.endswith(": ok")


def test_tables_are_data_and_progress_is_talk(shown):
    data, talk = shown
    for word in ("Similarity", "Nearest neighbour", "commands", "doorbells", "interrupts", "host to device",
                 "device to host", "engine time", "plain numpy", "ratio", "emulated"):
        assert word in data
    assert "embedding on the device" in talk
    assert "embedding on the device" not in data


def test_json_holds_the_sentences_in_the_order_given():
    texts = ["A long sentence about cats, dogs, and what they have for breakfast on Sundays.", "", "Short.", LONG,
             "日本語と emoji 🙂 \u202e and \x07 control", "Short."]
    done = demo("--json", "--repeat", "1", "--", *texts)
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    assert found["schema"] == 1
    sentences = found["sentences"]
    assert [s["text"] for s in sentences] == texts
    assert [s["truncated"] for s in sentences] == [False, False, False, True, False, False]
    assert sentences[1]["tokens"] == 2
    assert sentences[3]["tokens"] == 256
    embeddings = np.array([s["embedding"] for s in sentences])
    assert embeddings.shape == (6, 384)
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert np.array_equal(embeddings[2], embeddings[5])
    figures = found["figures"]
    assert figures["passed"] is True
    assert figures["largest_difference"] < 2e-5
    assert figures["smallest_cosine"] > 0.99999
    assert figures["counters"]["macs"] == figures["macs"]
    assert figures["emulated"] is True


def test_file_gives_a_sentence_a_line_whatever_its_bytes(tmp_path):
    file = tmp_path / "sentences"
    file.write_bytes("one\r\n\nthree \u2028 still three\n".encode() + b"\xff\xfe no utf-8")
    done = demo("--json", "--repeat", "1", "--text", str(file))
    assert done.returncode == 0, done.stderr.decode()
    assert [s["text"] for s in json.loads(done.stdout)["sentences"]] == [
        "one", "", "three \u2028 still three", "\ufffd\ufffd no utf-8"]


def test_arguments_that_are_no_unicode_are_embedded_and_shown():
    done = demo("--repeat", "1", b"caf\xe9", "[bold]brackets[/bold]", LONG)
    assert done.returncode == 0, done.stderr.decode()
    assert "[bold]brackets[/bold]" in done.stdout.decode()
    assert "Sentence 3 has more than 256 tokens" in done.stdout.decode()


def test_no_sentences_are_no_error():
    done = demo("--json", "--repeat", "1", "--text", "-", input=b"")
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["sentences"] == []
    done = demo("--repeat", "1", "--text", "-", input=b"")
    assert done.returncode == 0, done.stderr.decode()


def test_usage_and_absent_devices_have_their_exit_codes(tmp_path):
    assert demo("--text", "/dev/null", "a sentence").returncode == 2
    assert demo("--repeat", "0").returncode == 2
    done = demo("--device", str(tmp_path / "nobody"), "hello")
    assert done.returncode == 3, done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_a_device_that_dies_ends_the_demo_within_two_seconds(tmp_path):
    path = str(tmp_path / "s")
    process = spawn("--socket", path)
    listening(process, 1)
    client = subprocess.Popen(command("--device", path, "--repeat", "1000"), env=settings(), stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, bufsize=0)
    try:
        time.sleep(5)
        assert client.poll() is None, client.communicate()
        process.kill()
        killed = time.monotonic()
        _, talk = client.communicate(timeout=20)
        ended = time.monotonic()
    finally:
        for one in (client, process):
            one.kill()
            one.communicate()
    assert client.returncode == 5, talk.decode()
    assert b"Traceback" not in talk
    promptly(killed, 2, ended)
