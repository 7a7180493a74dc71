"""Whatever is, or is not, behind a path gets a typed error that says what to do; fork leaves the device alone."""

import os
import socket
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from helpers.scripted_server import Device, Peer, until_closed

from maia_rt.errors import DeviceBusy, DeviceNotFound, InvalidArgument, ProtocolError
from maia_rt.transport.vfio_user import VfioUserClient

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def listener(tmp_path):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(tmp_path / "device.sock"))
    sock.listen(1)
    sock.settimeout(10)
    yield sock
    sock.close()


def serve_once(listener, script):
    def run():
        conn, _ = listener.accept()
        peer = Peer(conn)
        try:
            script(peer)
        finally:
            peer.close()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_device_is_opened_by_its_path(listener):
    def script(peer):
        Device().handshake(peer)
        until_closed(peer)

    thread = serve_once(listener, script)
    with VfioUserClient.connect(Path(listener.getsockname())) as device:
        assert device.name == listener.getsockname()
        assert stat.S_ISSOCK(os.fstat(device.liveness_fd).st_mode)
        assert not os.get_inheritable(device.liveness_fd)
    thread.join()


def test_an_absent_path_is_no_device(tmp_path):
    with pytest.raises(DeviceNotFound, match="maia emulate --socket"):
        VfioUserClient.connect(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(DeviceNotFound, match="not a directory"):
        VfioUserClient.connect(tmp_path / "file" / "socket")


def test_a_file_or_a_folder_is_no_device(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path):
        with pytest.raises(DeviceNotFound, match="not a socket"):
            VfioUserClient.connect(path)


def test_a_socket_that_its_server_left_behind_is_no_device(tmp_path):
    path = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))
    with pytest.raises(DeviceNotFound, match="nobody listens"):
        VfioUserClient.connect(path)


def test_a_datagram_socket_is_no_vfio_user_server(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "datagram"))
        with pytest.raises(ProtocolError, match="not a stream socket"):
            VfioUserClient.connect(tmp_path / "datagram")


def test_a_path_too_long_for_a_socket_is_a_bad_argument(tmp_path):
    long = tmp_path
    while len(str(long)) < 150:
        long = long / "a-rather-long-name-for-a-folder"
    long.mkdir(parents=True)
    folder = os.open(long, os.O_PATH)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(f"/proc/self/fd/{folder}/s")
    os.close(folder)
    with pytest.raises(InvalidArgument, match="too long"):
        VfioUserClient.connect(long / "s")


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_a_time_out_must_be_a_time(timeout, tmp_path):
    with pytest.raises(InvalidArgument):
        VfioUserClient.connect(tmp_path / "absent", timeout)
    ours, theirs = socket.socketpair()
    with theirs, pytest.raises(InvalidArgument):
        VfioUserClient.from_socket(ours, timeout=timeout)
    assert ours.fileno() == -1


def test_a_socket_of_another_user_may_not_be_opened(listener):
    path = listener.getsockname()
    os.chmod(path, 0)
    code = textwrap.dedent(f"""
        import os
        from maia_rt.transport.vfio_user import VfioUserClient
        from maia_rt.errors import DevicePermission
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        try:
            VfioUserClient.connect({path!r})
        except DevicePermission as error:
            print("refused:", error)
    """)
    done = run_python(code)
    assert "refused:" in done


def test_a_server_that_does_not_answer_is_busy_with_another_client(listener):
    with pytest.raises(DeviceBusy, match="serves another client"):
        VfioUserClient.connect(listener.getsockname(), timeout=0.1)


def test_a_server_whose_backlog_is_full_is_busy(tmp_path):
    path = str(tmp_path / "full")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(path)
        sock.listen(0)
        waiting = []
        try:
            while len(waiting) < 16:
                other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                waiting.append(other)
                other.settimeout(0.05)
                other.connect(path)
        except (TimeoutError, BlockingIOError):
            with pytest.raises(DeviceBusy):
                VfioUserClient.connect(path, timeout=0.1)
        finally:
            for other in waiting:
                other.close()


def test_a_server_that_says_busy_is_busy(listener):
    thread = serve_once(listener, lambda peer: peer.reply(peer.request(1), flags=0x21, errno=16))
    with pytest.raises(DeviceBusy):
        VfioUserClient.connect(listener.getsockname())
    thread.join()


def test_a_server_that_hangs_up_is_no_vfio_user_server(listener):
    thread = serve_once(listener, lambda peer: None)
    with pytest.raises(ProtocolError, match="instead of answering VERSION"):
        VfioUserClient.connect(listener.getsockname())
    thread.join()


def test_another_kind_of_server_is_recognised(listener):
    thread = serve_once(listener, lambda peer: peer.send(b"220 mail.example.org ESMTP ready\r\n"))
    with pytest.raises(ProtocolError, match="not a vfio-user server"):
        VfioUserClient.connect(listener.getsockname())
    thread.join()


def run_python(code):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_forked_child_never_touches_the_device_and_does_not_keep_it_open():
    said = run_python("""
        import os, warnings
        from helpers.dma_memory import Memory
        from helpers.scripted_server import Device, Region, playing, until_closed
        from maia_rt.errors import ForkedError
        from maia_rt.transport.vfio_user import VfioUserClient
        warnings.simplefilter("ignore", DeprecationWarning)

        fd = os.memfd_create("region")
        os.ftruncate(fd, 0x1000)
        said = []

        def script(peer):
            Device(regions=[Region(0x1000, 7, fd)]).handshake(peer)
            handshake = len(peer.seen)
            until_closed(peer)
            said.extend(request.command for request in peer.seen[handshake:])

        with playing(script) as sock, Memory() as memory:
            device = VfioUserClient.from_socket(sock, "forked")
            device.map(0).release()
            number = device.liveness_fd
            with device._lock:          # as if another thread were in a call
                child = os.fork()
            if child == 0:
                failures = []
                for action in (lambda: device.read(0, 0, 4), lambda: device.write(0, 0, 4, 0), device.reset,
                               device.service, lambda: device.read_bytes(0, 0, 4), lambda: device.map(0),
                               lambda: device.dma_map(0, memory), lambda: device.irq_disable(2)):
                    try:
                        action()
                        failures.append(action)
                    except ForkedError:
                        pass
                device.close()
                try:
                    os.fstat(number)
                    failures.append("the socket is open")
                except OSError:
                    pass
                mapped = open("/proc/self/maps").read()
                if "memfd:region" in mapped:
                    failures.append("the region is mapped")
                del device
                os._exit(len(failures))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            device.write(0, 0, 4, 1)
            device.close()
        print(said)
    """)
    assert said == "[10]\n"
